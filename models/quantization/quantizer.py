"""How weights are quantized: the contract of conf/quantizer/*.yaml."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from models.layerwise import Reading
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# O outputs of a matrix, I its inputs, K channels that are scaled

# Takes the matrices that share an input, each with the statistics of `reading`; and each input's channel, Int64[I].
# Returns Float32[K], above 0: their weights are multiplied by it, and their input is divided.
Scales = Callable[[Sequence[tuple[Tensor, Any]], Tensor, WeightScheme], Tensor]


@runtime_checkable
class Quantizer(Protocol):
    reading: Callable[[int], Reading] | None  # gathers statistics of a matrix's inputs; None: no text is needed
    # None: weights are quantized as they are. Else they are scaled before, wherever the operation that makes their
    # input can take the scale's inverse (models.quantization.folding), and a `reading` has divided(scale_I): the
    # statistics of the scaled input.
    scales: Scales | None

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        """`read`: the statistics of `reading`, or None. Raises Refusal for weights that are NaN or infinite."""
        ...
