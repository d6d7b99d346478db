"""Every weight to its nearest number, of a range that leaves out what costs more to hold than to cut off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.grid import Grid, Quantized


@dataclass(frozen=True)
class Clipped:
    """Of `steps` ranges between the whole one and `smallest` of it, for each scale the one of least squared error."""

    steps: int = 40
    smallest: float = 0.4
    reading: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise Refusal(f"quantizer.steps={self.steps}: need at least 2; 1 is quantizer=nearest")
        if not 0 < self.smallest < 1:
            raise Refusal(f"quantizer.smallest={self.smallest}: need (0, 1), the share of the range that is left")

    def quantized(self, weight_OI: Tensor, grid: Grid, read: Any) -> Quantized:
        return grid.nearest(weight_OI, *self.fitted(weight_OI, grid))

    def fitted(self, weight_OI: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """(scale, zero_point)."""
        low, high = grid.ranges(weight_OI)
        scale, zero_point = grid.of_range(low, high)
        best = _error(weight_OI, grid.nearest(weight_OI, scale, zero_point))
        for share in torch.linspace(1, self.smallest, self.steps)[1:].tolist():
            tried = grid.of_range(share * low, share * high)
            error = _error(weight_OI, grid.nearest(weight_OI, *tried))
            better = error < best
            best = torch.where(better, error, best)
            scale, zero_point = (
                torch.where(better, new, old) for new, old in zip(tried, (scale, zero_point), strict=True)
            )
        return scale, zero_point


def _error(weight_OI: Tensor, made: Quantized) -> Tensor:
    """Float[O | 1, G]: the squared error of all weights that share a scale."""
    groups_OGS = (weight_OI.float() - made.dequantized()).square().unflatten(1, (made.scale.shape[1], -1))
    found = groups_OGS.sum(-1)
    return found.sum(0, keepdim=True) if len(made.scale) == 1 else found
