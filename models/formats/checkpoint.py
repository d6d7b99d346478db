"""A plain checkpoint's files on their way into an export: tensors shard by shard, and what lies beside them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from models.errors import Refusal
from models.folder import INDEX, part_names
from models.load import DTYPES, empty_model, load_config, parameter_count
from models.transformers_4 import add_older_words

# The files of a model beside its weights; files that a stage has left there are not copied.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
    "*.model",
)
_OTHERS = ("generation_config.json", "*.py")  # code of families that come with it; it runs only where it is asked for


def shards(folder: Path) -> list[Path]:
    """The files that hold the weights, those that transformers would open, in one order always."""
    return [folder / name for name in part_names(folder, str(folder))]


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(path, "pt") as file:
        for name in file.keys():
            yield name, file.get_tensor(name)


def names(folder: Path) -> list[str]:
    """The names of all tensors, which are not read."""
    found: list[str] = []
    for path in shards(folder):
        with safe_open(path, "pt") as file:
            found += file.keys()
    return found


def rewritten(
    source: Path,
    target: Path,
    change: Callable[[str, Tensor], Mapping[str, Tensor]],
    additions: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> float:
    """A checkpoint with other tensors: what `change` makes of each, shard by shard. `additions` go into its config.

    Gives the bits of all tensors, for each of the model's parameters (tied ones count once).
    """
    weight_map: dict[str, str] = {}
    total = 0
    paths = shards(source)
    for path in paths:
        changed = {
            new: value.contiguous() for name, tensor in tensors(path) for new, value in change(name, tensor).items()
        }
        total += sum(value.numel() * value.element_size() for value in changed.values())
        weight_map |= dict.fromkeys(changed, path.name)
        save_file(changed, target / path.name, metadata={"format": "pt", **(metadata or {})})
    if len(paths) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    beside(source, target, additions)
    return 8 * total / parameter_count(empty_model(load_config(str(source))))


def beside(source: Path, target: Path, additions: Mapping[str, Any]) -> None:
    """Tokenizer, generation config and config; `additions` are added to the config."""
    _copy(source, target, _TOKENIZER + _OTHERS)
    config = json.loads((source / "config.json").read_text())
    config.pop("torch_dtype", None)  # the older word for dtype
    (target / "config.json").write_text(json.dumps({**config, **additions}, indent=2) + "\n")
    add_older_words(target)


def add_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files that are not there yet: some containers need none of them."""
    _copy(source, target, _TOKENIZER)
    add_older_words(target)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            to = target / path.relative_to(source)
            if path.is_file() and not to.exists():
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, to)


def in_dtype(tensor: Tensor, dtype: str) -> Tensor:
    """Raises Refusal for numbers that are too large for the dtype."""
    found = tensor.to(DTYPES[dtype]) if tensor.is_floating_point() else tensor
    if not bool(torch.isfinite(found).all()):
        raise Refusal(f"export.dtype={dtype}: a weight is NaN, infinite or too large for it; use float32 or bfloat16")
    return found


def dtype_of(config: PretrainedConfig) -> str:
    """The dtype in a checkpoint's config."""
    found = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return found if found in DTYPES else "float32"
