"""Folder or hub id → model."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers import logging as transformers_logging
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.hub import cached_file

from models.errors import Refusal
from models.folder import ADAPTER, GENERATION, INDEX, WEIGHTS, check_files, check_folder, named, part_names, shapes_of
from models.whole import check_finite, check_report, check_tied, first_line, whole, without_masks

transformers_logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_config(path: str, role: str = "model", trust_remote_code: bool = False) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as problem:  # a family's own reading of odd values raises whatever it likes
        remedy = "take the model's own" if Path(path).is_dir() else "give a folder, or a hub id that can be reached"
        raise Refusal(f"{named(path, role)}: its config does not open: {first_line(problem)}; {remedy}") from None
    if not hasattr(config, "vocab_size") or not hasattr(config, "num_hidden_layers"):
        raise Refusal(
            f"{named(path, role)}: {type(config).__name__} joins several models; give the text model alone, as a folder"
        )
    return config


def attention_for(wanted: str, device: str, dtype: torch.dtype) -> str | None:
    """`wanted`, where `auto` is FlashAttention 2 if it is installed and can run, and transformers' own choice if not
    (None: PyTorch's fused attention for most families)."""
    if wanted != "auto":
        return wanted
    has_flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if device == "cuda" and has_flash and dtype != torch.float32 else None


def attention_of(config: PretrainedConfig, wanted: str | None) -> str | None:
    """`wanted`, or eager where the family caps its attention's scores: PyTorch's fused attention cannot, and older
    versions of transformers choose it for them all the same. FlashAttention and flex_attention can."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and wanted == "sdpa":
        raise Refusal(
            f"trainer.attention=sdpa: {type(config).__name__} caps its attention's scores at {cap}, which sdpa leaves "
            f"out; need auto, eager or flash_attention_2"
        )
    return wanted or (None if cap is None else "eager")


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    role: str = "model",
    trust_remote_code: bool = False,
    device: str = "cpu",
    **words: Any,
) -> Any:
    """Open a folder or hub id, safetensors only, and refuse what is not the whole of the model that its config
    describes: missing, unexpected or mismatched tensors, and numbers that are not finite. Under an active ZeRO-3 config
    the weights arrive sharded; else on `device`, cpu or cuda: tensor by tensor onto this process's own GPU, so that the
    ranks of a host do not each hold the model in its memory. `words` are from_pretrained's own."""
    check_folder(path, role)
    told = named(path, role)
    folder = path
    if not Path(path).is_dir():
        folder, words["revision"] = _downloaded(path, told)
    config = load_config(path, role, trust_remote_code)
    sharded = is_deepspeed_zero3_enabled()
    if sharded:  # transformers then asks for missing tensors only, and wrong shapes stop rank 0 alone
        _check_names(folder, config, told)
    elif device == "cuda":
        words = {"device_map": {"": torch.cuda.current_device()}, **words}
    with whole(told, "it does not open as a causal language model"):
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention_of(config, attention),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be told of them
            **words,
        )
    model, report = opened
    if report["unexpected_keys"] and Path(folder).is_dir():
        report = without_masks(report, shapes_of(Path(folder), told))
    check_report(report, told)
    check_finite(model, told, sharded)
    if not sharded:
        check_tied(model, told)
    return model


def check_model(path: str, role: str, trust_remote_code: bool = False) -> None:
    """Refuse, without its weights, a folder or hub id that would not open."""
    check_folder(path, role)
    if Path(path).is_dir():
        check_weights(path, role, load_config(path, role, trust_remote_code))


def check_weights(path: str, role: str, config: PretrainedConfig) -> None:
    """Refuse a folder whose tensors, by the headers of its files, are not those of its config. Reads no weights, and
    passes what only a load can tell: packed weights, code of the folder's own, a hub id."""
    if Path(path).is_dir():
        if (Path(path) / GENERATION).is_file():
            with whole(named(path, role), f"{GENERATION} does not open"):
                GenerationConfig.from_pretrained(path)
        _check_names(path, config, named(path, role))


def _check_names(folder: str, config: PretrainedConfig, told: str) -> None:
    """As transformers itself finds them, with tensors that have no values: families rename and merge them on their way
    in."""
    if type(config).__module__.startswith("transformers_modules."):
        return
    with unsharded(), whole(told, what := "its config makes no causal language model"):
        try:
            kind: Any = type(empty_model(config))
        except RuntimeError as problem:  # of numbers that do not fit each other, as longrope's lists
            raise Refusal(f"{told}: {what}: {first_line(problem)}; take the model's own config.json") from None
        if getattr(config, "quantization_config", None):
            return
        shapes = shapes_of(Path(folder), told)
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        _, report = kind.from_pretrained(
            None,
            config=copy.deepcopy(config),
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_report(without_masks(report, shapes), told)


def _downloaded(path: str, told: str) -> tuple[str, str]:
    """The folder of a hub id's files, as far as they say what the model is, and the commit that they are of."""

    def fetched(name: str, **words: str) -> Path | None:
        try:
            return Path(str(cached_file(path, name, **words)))
        except (OSError, ValueError):
            return None

    if (config := fetched("config.json")) is None:
        raise Refusal(f"{told}: it has no config.json, or cannot be reached; give a folder, or another hub id")
    folder = config.parent
    words = {"revision": folder.name}
    fetched(ADAPTER, **words)
    if fetched(WEIGHTS, **words) is None and fetched(INDEX, **words) is not None:
        for name in part_names(folder, told):
            fetched(name, **words)
    check_files(folder, told)
    return str(folder), folder.name


@contextmanager
def unsharded() -> Iterator[None]:
    """In it models are loaded whole, also while the student's ZeRO-3 configuration is registered."""
    from transformers.integrations import deepspeed as bridge

    students = bridge._hf_deepspeed_config_weak_ref
    bridge._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        bridge._hf_deepspeed_config_weak_ref = students


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> nn.Module:
    """The architecture without memory, on the meta device: for counting and for names."""
    with unsharded(), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def parameter_count(model: nn.Module) -> int:
    """Distinct parameters: tied tables count once."""
    return sum(p.numel() for p in model.parameters())
