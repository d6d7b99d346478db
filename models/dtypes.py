"""Names of dtypes in a safetensors file."""

from __future__ import annotations

import torch

from models.errors import Refusal

DTYPE_OF = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E8M0": torch.float8_e8m0fnu},
    **{"F8_E5M2": torch.float8_e5m2, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "C64": torch.complex64},
}
_NAMES = {dtype: name for name, dtype in DTYPE_OF.items()}


def name_of(dtype: torch.dtype) -> str:
    """Raises Refusal for what the format does not hold, and for numbers that share a byte, whose shape it changes."""
    if dtype not in _NAMES:
        raise Refusal(f"a tensor of {dtype} cannot be written: safetensors has {', '.join(_NAMES.values())}")
    return _NAMES[dtype]
