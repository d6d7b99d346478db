"""How weights come onto a grid: the contract of conf/quantizer/*.yaml."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from models.layerwise import Reading
from models.quantization.grid import Grid, Quantized


@runtime_checkable
class Method(Protocol):
    reading: Callable[[int], Reading] | None  # takes in what a matrix of a width reads; None: no text is needed

    def quantized(self, weight_OI: Tensor, grid: Grid, read: Any) -> Quantized:
        """`read`: what `reading` has become, or None. Raises Refusal for weights that are no numbers."""
        ...
