"""Packed files turned into an ordinary model in memory, where their own kernels cannot be had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from models.errors import Refusal
from models.formats.checkpoint import shards, tensors
from models.formats.loaded import Unpacked
from models.load import DTYPES, empty_model, load_config


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
    kind: Any = type(empty_model(config))
    # As from a folder: families rename tensors on their way in.
    model, told = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=DTYPES["float32"], output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[what]:
            raise Refusal(f"{folder}: {what.replace('_', ' ')} {sorted(told[what])[0]}; nothing was written")
    return Unpacked(model.to(device))
