"""How weights come onto a grid: the contract of conf/quantizer/*.yaml."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from models.layerwise import Reading
from models.quantization.grid import Grid, Quantized


@runtime_checkable
class Method(Protocol):
    needs_calibration_data: ClassVar[bool]

    def reading(self, width: int) -> Reading:
        """Takes in what a matrix of this width reads; only asked for where the method needs calibration data."""
        ...

    def quantized(self, weight_OI: Tensor, grid: Grid, read: Any) -> Quantized:
        """`read`: what `reading` has become, or None. Raises Refusal for weights that are no numbers."""
        ...
