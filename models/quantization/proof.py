"""Whether a model that was written is made of the integers beside it, how large it is, and how far from its parent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal
from models.heads import head_of
from models.layerwise import Passage
from models.load import parameter_count
from models.matrices import matrices
from models.objectives.chunked import objective_sum
from models.objectives.forward_kl import ForwardKL
from models.objectives.signal import Dense
from models.offloaded import Offloaded
from models.quantization import cache
from models.quantization.activations import attach
from models.quantization.stored import BlockWeights, QuantizedWeights


def round_as_quantized(model: Any, held: QuantizedWeights | BlockWeights) -> None:
    """From now on a plain model rounds its activations, keys and values as it was quantized or trained to."""
    if isinstance(held, QuantizedWeights):
        attach(model, held)
    if held.cache is not None:
        cache.attach(model)


def check_held(
    model: Any,
    held: QuantizedWeights | BlockWeights,
    dtype: torch.dtype,
    whose: str,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """`model`: as it was reloaded; `whose`: for the message, who quantized it; `weights`: of its layers, where they are
    not in it. Raises Refusal where a weight is not its dequantized value."""
    by_name = {str(matrix): matrix for matrix in matrices(model)}
    for name, quantized in held.matrices.items():
        parameter = by_name[name].parameter
        weight_OI = by_name[name].of(model.get_parameter(parameter) if weights is None else weights[parameter])
        if not torch.equal(weight_OI, quantized.dequantized().to(weight_OI.device, dtype)):
            raise Refusal(f"{whose}: {name} is not made of its integers once reloaded; nothing was written")


def bits_per_weight(model: Any, quantized: QuantizedWeights | BlockWeights, dtype: torch.dtype) -> float:
    """Of all parameters: quantized ones by what their integers take, the others by the dtype."""
    numbers = parameter_count(model)
    held = [matrix for matrix in matrices(model) if str(matrix) in quantized.matrices]
    on_it = sum(matrix.of(model.get_parameter(matrix.parameter)).numel() for matrix in held)
    bits = sum(quantized.bits(str(matrix)) for matrix in held)
    return (bits + (numbers - on_it) * torch.finfo(dtype).bits) / numbers


@torch.no_grad()
def divergence(
    parent: Offloaded, made: Offloaded, held: QuantizedWeights, batches: Sequence[Tensor]
) -> dict[str, float]:
    """KL of the model's next tokens from its parent's, in nats per token of the calibration samples: with quantized
    weights, and with quantized activations too."""
    want = Passage(parent.model, batches, parent.weights).last()
    sums = {"kl_of_weights": 0.0, "kl_with_activations": 0.0}
    for name in sums:
        handles = attach(made.model, held) if name == "kl_with_activations" else []
        got = Passage(made.model, batches, made.weights).last()
        for ids, hidden, of_parent in zip(batches, got, want, strict=True):
            signal = Dense(of_parent, head_of(parent.model))
            kl, _ = objective_sum(ForwardKL(temperature=1.0), hidden, head_of(made.model), ids, signal)
            sums[name] += float(kl)
        for handle in handles:
            handle.remove()
    tokens = sum(ids.numel() for ids in batches)
    return {name: total / tokens for name, total in sums.items()}
