"""Round-to-nearest over a range that is clipped where that lowers the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# O outputs of a matrix, I its inputs, G groups of I
Cost = Callable[[Tensor, int], Tensor]  # of errors [O, I] in so many groups: Float[O, G]


@dataclass(frozen=True)
class Clipped:
    """Of `steps` ranges between the whole one and `smallest` of it, for each scale the one of least squared error."""

    steps: int = 40
    smallest: float = 0.4
    reading: ClassVar[None] = None
    scales: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise Refusal(f"quantizer.steps={self.steps}: need at least 2; 1 is quantizer=round_to_nearest")
        if not 0 < self.smallest < 1:
            raise Refusal(f"quantizer.smallest={self.smallest}: need (0, 1), the share of the range that is left")

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        return scheme.quantize(weight_OI, *self.fitted(weight_OI, scheme))

    def fitted(self, weight_OI: Tensor, scheme: WeightScheme, cost: Cost | None = None) -> tuple[Tensor, Tensor]:
        """(scale, zero_point). `cost` of errors, where it is not their squares' sum."""
        cost = cost or _squares
        low, high = scheme.ranges(weight_OI)
        scale, zero_point = scheme.of_range(low, high)
        best = _cost(cost, weight_OI, scheme.quantize(weight_OI, scale, zero_point))
        for share in torch.linspace(1, self.smallest, self.steps)[1:].tolist():
            tried = scheme.of_range(share * low, share * high)
            found = _cost(cost, weight_OI, scheme.quantize(weight_OI, *tried))
            better = found < best
            best = torch.where(better, found, best)
            scale, zero_point = (
                torch.where(better, new, old) for new, old in zip(tried, (scale, zero_point), strict=True)
            )
        return scale, zero_point


def _cost(cost: Cost, weight_OI: Tensor, made: QuantizedMatrix) -> Tensor:
    """Float[O | 1, G]: of all weights that share a scale."""
    found_OG = cost(weight_OI.float() - made.dequantized(), made.scale.shape[1])
    return found_OG.sum(0, keepdim=True) if len(made.scale) == 1 else found_OG


def _squares(error_OI: Tensor, groups: int) -> Tensor:
    return error_OI.square().unflatten(1, (groups, -1)).sum(-1)
