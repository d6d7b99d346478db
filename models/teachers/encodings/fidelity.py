"""What an encoding keeps of a teacher: its own KL, and the error of the gradient it gives a student."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from models import seeds
from models.objectives.chunked import objective_sum
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.signal import Dense
from models.teachers.encodings.encoding import Encoding, Payload
from models.teachers.pieces import Piece

_NOISE = 1.0  # of the spread of the hidden states: a student that is not yet its teacher


def fidelities(
    encoding: Encoding, pieces: Iterable[Piece], hidden: Float[Tensor, "B T H"], head: Head, most_tokens: int
) -> dict[str, dict[str, float | int]]:
    """By temperature, on pieces of a batch with `most_tokens` supervised tokens; on one piece at least."""
    chosen: list[Piece] = []
    count = 0
    for piece in pieces:
        if not chosen or count + len(piece.supervised) <= most_tokens:
            chosen.append(piece)
            count += len(piece.supervised)
    payloads = [encoding.encode(piece.states(hidden), head, seeds.of_piece(piece.key)) for piece in chosen]
    payload = {name: torch.cat([each[name] for each in payloads]) for name in payloads[0]}
    states_NH = torch.cat([piece.states(hidden) for piece in chosen])
    return {
        f"{temperature:g}": fidelity(encoding, payload, states_NH, head, temperature)
        for temperature in encoding.measured_at
    }


def fidelity(
    encoding: Encoding, payload: Payload, hidden_NH: Float[Tensor, "N H"], head: Head, temperature: float
) -> dict[str, float | int]:
    """Against the dense teacher, on N tokens whose `payload` the encoding made.

    `own_kl`: the divergence of a student that equals the teacher, nats per token. For a student that is the teacher
    with noise on its hidden states: the divergence per token, dense and as encoded, and the gradient's error as a share
    of the dense gradient's norm: of the head's weight, which sums over tokens as every weight's gradient does,
    and token by token. The error of sampled tokens is large at each token, and much smaller in the sum.
    """
    head = Head(
        head.weight.detach().float().requires_grad_(),
        None if head.bias is None else head.bias.float(),
        head.scale,
        head.softcap,
    )
    hidden_NH = hidden_NH.detach().float()
    targets_N = torch.zeros(len(hidden_NH), dtype=torch.long, device=hidden_NH.device)
    encoded, dense = encoding.signal(payload, head), Dense(hidden_NH, head)
    divergence = ForwardKL(temperature)
    generator = torch.Generator(device=hidden_NH.device).manual_seed(0)
    noise_NH = torch.randn(hidden_NH.shape, generator=generator, device=hidden_NH.device)
    noisy_NH = (hidden_NH + _NOISE * hidden_NH.std() * noise_NH).requires_grad_()
    with torch.no_grad():
        own, _ = objective_sum(divergence, hidden_NH, head, targets_N, encoded)
    with torch.enable_grad():
        sums = [objective_sum(divergence, noisy_NH, head, targets_N, each)[0] for each in (dense, encoded)]
    truth, got = (torch.autograd.grad(total, (head.weight, noisy_NH)) for total in sums)
    errors = [((g - t).norm() / t.norm().clamp_min(1e-30)).item() for g, t in zip(got, truth, strict=True)]
    count = max(1, len(hidden_NH))
    return {
        "tokens": len(hidden_NH),
        "temperature": temperature,
        "own_kl": own.item() / count,
        "kl_dense": sums[0].item() / count,
        "kl_encoded": sums[1].item() / count,
        "gradient_error": errors[0],
        "gradient_error_per_token": errors[1],
    }
