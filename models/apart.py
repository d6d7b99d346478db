"""Whether a family keeps the documents of a packed sequence apart: asked before its weights are there."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from models.errors import Refusal
from models.heads import crossing

_MOST_LAYERS = 8
_VOCABULARY = 32


def check_apart(config: PretrainedConfig, role: str) -> None:
    """Refuse a family whose documents see each other, by a small model of it with fresh weights.

    Where no small one can be made of the config, check_split asks the model itself before the first step.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(_small(config), dtype=torch.float32).eval()
            leak = crossing(model, _VOCABULARY)
    except Exception:  # whatever a family says of widths that it does not know
        return
    if leak is not None:
        raise Refusal(f"{role}: {leak}")


def _small(config: PretrainedConfig) -> PretrainedConfig:
    """The same kinds of layers, with heads of the same width, and little else: two heads, a short vocabulary.

    All that depends on a head's width (rotations, their scaling) stays as it is.
    """
    values = config.to_dict()
    had = config.num_attention_heads
    head_dim = values.get("head_dim") or config.hidden_size // had
    kv_heads = values.get("num_key_value_heads") or had
    depth = _depth(values.get("layer_types"), config.num_hidden_layers)
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == config.num_hidden_layers:
            values[name] = value[:depth]
    wanted: dict[str, int] = {
        "num_hidden_layers": depth,
        "num_attention_heads": 2,
        "num_key_value_heads": 2 if kv_heads == had else 1,
        "hidden_size": 2 * head_dim,
        "intermediate_size": 64,
        "vocab_size": _VOCABULARY,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 4,
        "num_local_experts": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "word_embed_proj_dim": 2 * head_dim,  # opt
        "ffn_dim": 64,
    }
    if values.get("mamba_n_heads") and isinstance(values.get("mamba_d_head"), int):  # together as wide as its expansion
        wanted["mamba_n_heads"] = values.get("mamba_expand", 2) * wanted["hidden_size"] // values["mamba_d_head"]
        wanted["mamba_n_groups"] = 1
    names = {config.attribute_map.get(name, name): value for name, value in wanted.items()}
    values |= {name: value for name, value in names.items() if values.get(name) is not None}
    values |= {name: None for name in ("bos_token_id", "eos_token_id") if name in values}
    values |= {"pad_token_id": 0} if values.get("pad_token_id") is not None else {}
    for name in ("model_type", "transformers_version", "_name_or_path", "quantization_config", "dtype"):
        values.pop(name, None)
    return type(config)(**values)


def _depth(kinds: list[str] | None, depth: int) -> int:
    """So many layers that every kind is among them, and never more than a few."""
    if not kinds:
        return min(depth, 2)
    return min(depth, _MOST_LAYERS, 1 + max(kinds.index(kind) for kind in set(kinds)))
