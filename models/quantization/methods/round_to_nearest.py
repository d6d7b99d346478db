"""Round-to-nearest (RTN): every weight by itself, over the whole range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from models.quantization.scheme import QuantizedMatrix, WeightScheme


@dataclass(frozen=True)
class RoundToNearest:
    reading: ClassVar[None] = None
    scales: ClassVar[None] = None

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        return scheme.quantize(weight_OI, *scheme.of_range(*scheme.ranges(weight_OI)))
