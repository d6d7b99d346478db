"""Every weight to its nearest number: round-to-nearest, the range being all that there is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from models.quantization.grid import Grid, Quantized


@dataclass(frozen=True)
class Nearest:
    reading: ClassVar[None] = None
    scales: ClassVar[None] = None

    def quantized(self, weight_OI: Tensor, grid: Grid, read: Any) -> Quantized:
        return grid.nearest(weight_OI, *grid.of_range(*grid.ranges(weight_OI)))
