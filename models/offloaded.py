"""A model whose decoder layers stay on disk, to be read one at a time (models.layerwise.Passage)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor

from models.files import remove
from models.load import empty_model, load_config, load_model
from models.matrices import name_of_layers
from models.representations import decoder_layers


@dataclass(frozen=True)
class Offloaded:
    """All buffers, and the parameters outside of the decoder layers, are where they are needed; the layers' are on the
    meta device."""

    model: Any
    weights: Mapping[str, Tensor]  # of the layers, by the model's names: each is read when it is asked for


def load_offloaded(path: str, aside: Path, *, device: str, dtype: torch.dtype, trust_remote_code: bool) -> Offloaded:
    """Open a folder or hub id as `load_model` does, with the same numbers.

    transformers itself finds the layers' weights in the checkpoint. Those that it merges on loading (experts) it writes
    to the folder `aside`, one at a time.
    """
    # Written over, what is still mapped of an earlier reading would change under its reader.
    remove(aside)
    empty = empty_model(load_config(path, trust_remote_code=trust_remote_code))
    layers = name_of_layers(empty)
    named = [*empty.state_dict(), *(name for name, _ in empty.named_buffers())]
    owners = {name.rpartition(".")[0] for name in named if not name.startswith(f"{layers}.")}
    model = load_model(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map={**dict.fromkeys(sorted(owners), device), layers: "disk"},
        offload_folder=str(aside),
    )
    hooks: list[Any] = [getattr(module, "_hf_hook", None) for module in decoder_layers(model).modules()]
    weights = next(hook.weights_map.dataset for hook in hooks if getattr(hook, "weights_map", None) is not None)
    # The hooks would read a layer for every batch, and lose what is changed of it.
    remove_hook_from_module(model, recurse=True)
    for module in model.modules():
        module.__dict__.pop("forward", None)  # which was put back as the module's own
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)  # and the layers' to where they were made
    del model.hf_device_map  # saving would take the weights from the hooks
    return Offloaded(model, weights)
