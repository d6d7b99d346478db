"""Packed files turned into an ordinary model in memory, where their own kernels cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.formats.checkpoint import shards, tensors
from models.formats.loaded import Unpacked
from models.load import DTYPES, load_config


def unpacked(
    folder: Path, device: str, part: str, weight: Callable[[dict[str, Tensor], dict[str, Any]], Tensor]
) -> Unpacked:
    """In float32, so that no product is rounded. `part`: what a packed module has and no other one."""
    config = load_config(str(folder), "export")
    said = config.quantization_config
    del config.quantization_config
    held = {name: tensor for path in shards(folder) for name, tensor in tensors(path)}
    state: dict[str, Tensor] = {}
    modules = [name.removesuffix(f".{part}") for name in held if name.endswith(f".{part}")]
    for module in modules:
        kinds = ("qweight", "qzeros", "scales", "g_idx")
        parts = {kind: held.pop(f"{module}.{kind}") for kind in kinds if f"{module}.{kind}" in held}
        state[f"{module}.weight"] = weight(parts, said)
    state |= {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPES["float32"])
    result = model.load_state_dict(state, strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if missing := [name for name in result.missing_keys if name not in tied]:
        raise Refusal(f"{folder}: {missing[0]} is missing; nothing was written")
    if result.unexpected_keys:
        raise Refusal(f"{folder}: {result.unexpected_keys[0]} belongs to nothing; nothing was written")
    model.tie_weights()
    with torch.no_grad():
        return Unpacked(model.to(device))
