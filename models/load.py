"""Folder or hub id → model and tokenizer, and back to a plain Hugging Face folder."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig
from transformers import logging as transformers_logging

from models.errors import Refusal

transformers_logging.disable_progress_bar()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_folder(path: str, role: str, weights: bool = True) -> None:
    """Refuse, before anything is loaded, a model folder that cannot be opened safely. A hub id passes unread.

    `role`: what the model is (teacher), or the setting that names it. `weights`: whether they will be opened, or only
    what lies beside them.
    """
    setting = role if "." in role else f"{role}.path"
    folder = Path(path)
    if not folder.exists():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise Refusal(f"{setting}={path}: no such folder; give a model folder or a hub id like org/name")
        return
    if not (folder / "config.json").is_file():
        raise Refusal(f"{setting}={path}: no config.json in it; give a folder AutoModelForCausalLM can open")
    if weights and (folder / "signal.json").is_file():
        raise Refusal(f"{setting}={path}: this is a teacher cache, without the model's weights; give its folder")
    if weights and not list(folder.glob("*.safetensors")):
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickled:
            raise Refusal(
                f"{setting}={path}: only pickled weights ({pickled[0]}), which can run code when opened; "
                f"convert them with save_pretrained(…, safe_serialization=True)"
            )
        raise Refusal(f"{setting}={path}: no *.safetensors in it; the weights are missing")


def load_config(path: str, role: str = "model", trust_remote_code: bool = False) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, json.JSONDecodeError) as problem:
        raise Refusal(
            f"{role}.path={path}: its config does not open: {_first_line(problem)} "
            f"(give a folder, or a hub id that can be reached)"
        ) from None
    if not hasattr(config, "vocab_size") or not hasattr(config, "num_hidden_layers"):
        raise Refusal(
            f"{role}.path={path}: {type(config).__name__} joins several models; give the text model alone, as a folder"
        )
    return config


def attention_for(wanted: str, device: str, dtype: torch.dtype) -> str | None:
    """`wanted`, where `auto` is FlashAttention 2 if it is installed and can run, and transformers' own choice if not
    (None: PyTorch's fused attention for most families)."""
    if wanted != "auto":
        return wanted
    has_flash = importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if device == "cuda" and has_flash and dtype != torch.float32 else None


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    attention: str | None = None,
    role: str = "model",
    trust_remote_code: bool = False,
    **words: Any,
) -> Any:
    """Open a folder or hub id, safetensors only. Under an active ZeRO-3 config the weights arrive sharded. `words` are
    from_pretrained's own."""
    check_folder(path, role)
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            **words,
        )
    except (OSError, ValueError, ImportError, SafetensorError) as problem:
        raise Refusal(
            f"{role}.path={path}: it does not open as a causal language model: {_first_line(problem)}"
        ) from None


def empty_model(config: PretrainedConfig) -> nn.Module:
    """The architecture without memory, on the meta device: for counting and for names."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameter_count(model: nn.Module) -> int:
    """Distinct parameters: tied tables count once."""
    return sum(p.numel() for p in model.parameters())


def save_model(model: Any, tokenizer: Any, folder: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Write `state` as a plain checkpoint: config, safetensors, tokenizer, generation config.

    `model` gives the architecture only, so that a sharded model's gathered weights can be written by one rank.
    """
    config = model.config
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    generation = getattr(model, "generation_config", None) or GenerationConfig.from_model_config(config)
    # Token ids follow the tokenizer that is saved beside the weights, or generation would not stop.
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name))
    model.save_pretrained(folder, state_dict=state, safe_serialization=True)
    config.dtype = dtype  # of what is written: save_pretrained says the model's own
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _first_line(problem: Exception) -> str:
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
