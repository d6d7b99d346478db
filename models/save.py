"""Model, tokenizer and weights → a plain Hugging Face folder, weights by weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig

from models.folder import GENERATION, INDEX, WEIGHTS
from models.load import check_weights
from models.transformers_4 import add_older_words

Weights = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]  # by name: all there, or one after the other
_PART_BYTES = 5 * 10**9  # of weights in a file
_PART = "part-{}.safetensors"


def save_model(
    model: Any, tokenizer: Any, folder: Path, weights: Weights, dtype: torch.dtype, part_bytes: int = _PART_BYTES
) -> None:
    """Write `weights` as a plain checkpoint: config, safetensors, tokenizer, generation config, for transformers 4 too.

    `model` gives the architecture only, so that a sharded model's gathered weights can be written by one rank. They may
    come one after the other (models.sharding.gathered_weights): no more than a file of them, of about `part_bytes`, is
    held in memory.
    """
    config = model.config
    generation = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(config)
    # Token ids follow the tokenizer that is saved beside the weights, or generation would not stop.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name))
    with _plain_generation(model):
        parts = _write_parts(model, folder, _cast(one_by_one(weights), dtype), part_bytes)
    config.dtype = dtype  # of what is written: save_pretrained says the model's own
    config.save_pretrained(folder)
    # Its own save_pretrained refuses what greedy decoding does not use, as many published ones hold: a temperature
    # without do_sample. What the source says is kept as it is.
    generation.to_json_file(folder / GENERATION, use_diff=True, keys_to_pop=["compile_config"])
    tokenizer.save_pretrained(folder)
    add_older_words(folder)
    if parts > 1:  # each was renamed and split alone, as its family does on its way out: together they are the model
        check_weights(str(folder), "what was saved", config)


def one_by_one(weights: Weights) -> Iterable[tuple[str, Tensor]]:
    """The names of a tied table directly after each other, with one tensor."""
    if not isinstance(weights, Mapping):
        return weights
    names: dict[tuple[int, torch.Size], list[str]] = {}
    for name, tensor in weights.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return ((name, weights[tied[0]]) for tied in names.values() for name in tied)


def _cast(weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    before: Tensor | None = None
    for name, tensor in weights:
        if tensor is not before:  # else a tied one
            before, made = tensor, tensor.to(dtype) if tensor.is_floating_point() else tensor
        yield name, made


def _write_parts(model: Any, folder: Path, weights: Iterable[tuple[str, Tensor]], part_bytes: int) -> int:
    """One file, or several with their index; how many. A layer lies in one file: families split and join the tensors of
    a layer on their way out, and transformers does that for each file by itself."""
    part: dict[str, Tensor] = {}
    block, size, count = "", 0, 0

    def write() -> None:
        nonlocal count
        count += 1
        # Whatever is beyond its limit, so that it is one file.
        model.save_pretrained(folder, state_dict=dict(part), max_shard_size=2 * size + 1)
        (folder / WEIGHTS).rename(folder / _PART.format(count))
        part.clear()

    before: Tensor | None = None
    for name, tensor in weights:
        if tensor is not before:  # else a tied one
            here = found[0] if (found := re.match(r".*?\.\d+\.", name)) else name
            if part and here != block and size + tensor.nbytes > part_bytes:
                write()
                size = 0
            block, size, before = here, size + tensor.nbytes, tensor
        part[name] = tensor
    write()
    _name_parts(folder, count)
    return count


def _name_parts(folder: Path, count: int) -> None:
    """By their number, as the hub does, with an index; or `model.safetensors` where there is one."""
    if count == 1:
        (folder / _PART.format(1)).rename(folder / WEIGHTS)
        return
    files: dict[str, str] = {}
    total = 0
    for number in range(1, count + 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        (folder / _PART.format(number)).rename(folder / name)
        with safe_open(folder / name, "pt") as opened:
            files |= dict.fromkeys(opened.keys(), name)
        with (folder / name).open("rb") as file:  # a file is the header's length, the header, and the tensors
            total += (folder / name).stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2, sort_keys=True)
    (folder / INDEX).write_text(text + "\n", encoding="utf-8")


@contextmanager
def _plain_generation(model: Any) -> Iterator[None]:
    """In it the model's generation config is transformers' own, which save_pretrained takes whatever the model's is."""
    had = getattr(model, "generation_config", None)
    if had is None:
        yield
        return
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = had
