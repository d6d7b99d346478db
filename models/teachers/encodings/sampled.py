"""Tokens drawn from the teacher: a few bytes a token, and right in expectation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import Refusal
from models.objectives import signal
from models.objectives.head import Head
from models.teachers.encodings.encoding import Encoding, Payload, in_chunks, wide


@dataclass(frozen=True)
class Sampled(Encoding):
    """`draws` tokens from softmax(logits / temperature) for every token, as ids with counts; Σ p log p exactly.

    Sparse Logit Sampling, arXiv:2503.16870: unlike a top-k, its gradient is the dense one on average, tail included.
    It serves forward KL at the temperature it was drawn at, and nothing else.
    """

    draws: int = 50
    temperature: float = 1.0
    name: ClassVar[str] = "sampled"

    def __post_init__(self) -> None:
        if not 1 <= self.draws < 2**16:
            raise Refusal(f"encoding.draws={self.draws}: need 1 to 65535; 50 is usual")
        if not self.temperature > 0:
            raise Refusal(f"encoding.temperature={self.temperature}: need a number above 0")

    @property
    def measured_at(self) -> list[float]:
        return [self.temperature]

    def encode(self, hidden_NH: Float[Tensor, "N H"], head: Head, seed: int) -> Payload:
        generator = torch.Generator(device=hidden_NH.device).manual_seed(seed)
        parts = [self.of(logits_nV, generator) for logits_nV in in_chunks(hidden_NH, head, wide(hidden_NH))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def of(self, logits_NV: Float[Tensor, "N V"], generator: torch.Generator) -> Payload:
        log_p_NV = torch.log_softmax(logits_NV / self.temperature, -1)
        p_NV = log_p_NV.exp()
        # In fp64: drawing adds the probabilities up, and in fp32 those of a long tail would vanish beside the sum.
        drawn_ND = torch.multinomial(p_NV.double(), self.draws, replacement=True, generator=generator).sort(-1).values
        fresh_ND = torch.ones_like(drawn_ND, dtype=torch.bool)
        fresh_ND[:, 1:] = drawn_ND[:, 1:] != drawn_ND[:, :-1]
        starts = fresh_ND.reshape(-1).nonzero().squeeze(1)  # every token's first draw is fresh, so runs end at tokens
        ends = torch.cat([starts[1:], starts.new_tensor([drawn_ND.numel()])])
        small = torch.uint8 if self.draws < 2**8 else torch.uint16
        return {
            "ids": drawn_ND[fresh_ND].to(torch.uint16 if logits_NV.shape[1] <= 2**16 else torch.int32),
            "counts": (ends - starts).to(small),
            "distinct": fresh_ND.sum(-1).to(small),
            "negentropy": torch.linalg.vecdot(p_NV, torch.where(p_NV > 0, log_p_NV, 0)),
        }

    def signal(self, payload: Payload, head: Head | None) -> signal.Signal:
        distinct_N = payload["distinct"].long()
        N, K = len(distinct_N), int(distinct_N.max()) if len(distinct_N) else 0
        within_NK = torch.arange(K, device=distinct_N.device)[None] < distinct_N[:, None]
        ids_NK = torch.zeros(N, K, dtype=torch.long, device=distinct_N.device)
        shares_NK = torch.zeros(N, K, dtype=wide(payload["negentropy"]), device=distinct_N.device)
        ids_NK[within_NK] = payload["ids"].long()
        shares_NK[within_NK] = payload["counts"].to(shares_NK.dtype) / self.draws
        return signal.Sampled(ids_NK, shares_NK, payload["negentropy"], self.temperature)

    def refusal(self, term: Any) -> str | None:
        if not hasattr(term, "add_sampled"):
            return f"{term.name} cannot be worked out from samples, only forward_kl can; record with encoding=top_k"
        if term.temperature != self.temperature:
            return (
                f"temperature={term.temperature:g}, and the signal is drawn at {self.temperature:g}; set "
                f"encoding.temperature={term.temperature:g}"
            )
        return None
