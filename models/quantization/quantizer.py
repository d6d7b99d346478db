"""How weights are quantized: the contract of conf/quantizer/*.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from models.layerwise import Reading
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# O what a matrix gives, I what it reads, K channels that a scale is wanted of

# Of the matrices that read one tensor, each with what `reading` has become; and which channel each input is, Int64[I].
# Gives Float32[K], above 0: their weights are multiplied by it, and what they read is divided.
Scales = Callable[[Sequence[tuple[Tensor, Any]], Tensor, WeightScheme], Tensor]


@runtime_checkable
class Quantizer(Protocol):
    reading: Callable[[int], Reading] | None  # takes in what a matrix of a width reads; None: no text is needed
    # None: weights are taken as they are. Else they are scaled before they are quantized, wherever what comes before
    # can take the scale's inverse (models.quantization.folding), and a `reading` has divided(scale_I): its own
    # like, of what is read then.
    scales: Scales | None

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        """`read`: what `reading` has become, or None. Raises Refusal for weights that are no numbers."""
        ...
