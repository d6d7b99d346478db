"""Whether a model that was written is made of the integers beside it, and what it takes to hold it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal
from models.load import parameter_count
from models.matrices import matrices
from models.quantization import cache
from models.quantization.activations import attach
from models.quantization.record import BlockRecord, Record


def read_as_recorded(model: Any, record: Record | BlockRecord) -> None:
    """From now on a plain model rounds what its matrices read, and its keys and values, as the record says."""
    if isinstance(record, Record):
        attach(model, record)
    if record.cache is not None:
        cache.attach(model)


def check_held(
    model: Any,
    record: Record | BlockRecord,
    dtype: torch.dtype,
    stage: str,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """`model`: as it was reloaded; `weights`: of its layers, where they are not in it. Raises Refusal where a weight is
    not the number that its integers say."""
    by_name = {str(matrix): matrix for matrix in matrices(model)}
    for name, quantized in record.matrices.items():
        parameter = by_name[name].parameter
        weight_OI = by_name[name].of(model.get_parameter(parameter) if weights is None else weights[parameter])
        if not torch.equal(weight_OI, quantized.dequantized().to(weight_OI.device, dtype)):
            raise Refusal(f"{stage}: {name} is not on its grid once reloaded; nothing was written")


def bits_per_weight(model: Any, record: Record | BlockRecord, dtype: torch.dtype) -> float:
    """Of all parameters: those of the record by what it holds of them, the others by the dtype."""
    numbers = parameter_count(model)
    held = [matrix for matrix in matrices(model) if str(matrix) in record.matrices]
    on_it = sum(matrix.of(model.get_parameter(matrix.parameter)).numel() for matrix in held)
    bits = sum(record.bits(str(matrix)) for matrix in held)
    return (bits + (numbers - on_it) * torch.finfo(dtype).bits) / numbers
