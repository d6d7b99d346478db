"""Packed files turned into an ordinary model in memory, where their own kernels cannot be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from models.formats.checkpoint import shards, tensors
from models.formats.loaded import Unpacked
from models.load import DTYPES, attention_of, empty_model, load_config
from models.whole import check_finite, check_report, whole


def unpacked(
    folder: Path, device: str, parts: Sequence[str], weight: Callable[[dict[str, Tensor], dict[str, Any]], Tensor]
) -> Unpacked:
    """In float32, so that no product is rounded. `parts`: names of a packed module's tensors, which
    are the format's own; the first is one that no other module has, and the others may be missing."""
    config = load_config(str(folder), "export")
    packing = config.quantization_config
    del config.quantization_config
    held = {name: tensor for path in shards(folder) for name, tensor in tensors(path)}
    state: dict[str, Tensor] = {}
    modules = [name.removesuffix(f".{parts[0]}") for name in held if name.endswith(f".{parts[0]}")]
    for module in modules:
        found = {part: held.pop(f"{module}.{part}") for part in parts if f"{module}.{part}" in held}
        state[f"{module}.weight"] = weight(found, packing)
    state |= {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in held.items()}
    kind: Any = type(empty_model(config))
    # As from a folder: families rename tensors on their way in.
    with whole(str(folder), "its unpacked weights do not open"):
        model, report = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=DTYPES["float32"],
            attn_implementation=attention_of(config, None),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_report(report, str(folder))
    check_finite(model, str(folder))
    return Unpacked(model.to(device))
