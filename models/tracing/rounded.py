"""A student whose matrices are rounded while it trains, where what they start from is only planned."""

from __future__ import annotations

from typing import Any

import torch

from models.matrices import matrices
from models.quantization.aware import Rounding
from models.quantization.qat import QAT, rounding_of
from models.quantization.scheme import QuantizedMatrix
from models.quantization.stored import Outline, QuantizedWeights


def rounding_like(qat: Any, outline: Outline | None, model: Any) -> Rounding | None:
    """What `qat.open` gives where the quantized weights are there, with tensors of the same shapes; None for roundings
    that another library computes, which a trace cannot follow. Inside `models.tracing.step.pretended`."""
    if not isinstance(qat, QAT) or outline is None or outline.scheme is None:
        return None
    scheme, there = outline.scheme.weights, {str(matrix) for matrix in matrices(model)}
    made = {}
    for name in there & outline.shapes.keys():
        weight = torch.empty(outline.shapes[name])
        made[name] = QuantizedMatrix(weight.int(), *scheme.of_range(*scheme.ranges(weight)))
    return rounding_of(qat, QuantizedWeights(outline.scheme, made), model)
