"""Small models of every family that can be pruned, with widths that tell each other apart."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 61
_LLAMA = {"num_key_value_heads": 2, "intermediate_size": 20}
SIZES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": {**_LLAMA, "head_dim": 6, "sliding_window": 5},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 6},
    "gemma": {**_LLAMA, "head_dim": 8},
    "gemma2": {**_LLAMA, "head_dim": 8, "sliding_window": 5},
    "phi3": {**_LLAMA, "pad_token_id": 0},
    "gpt2": {"n_inner": 20},
    "gpt_neox": {"intermediate_size": 20, "rotary_pct": 0.5},
    "opt": {"ffn_dim": 20, "word_embed_proj_dim": 32, "dropout": 0.0},
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_LLAMA, "head_dim": 6, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True,
    },
}  # fmt: skip
FAMILIES = list(SIZES)
# Mixtures of experts that are not pruned here.
_OTHERS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {
        **_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 28, "mlp_only_layers": [], "decoder_sparse_step": 1,
    },
    "olmoe": {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
}  # fmt: skip
MIXTURES = ["mixtral", "qwen3_moe", *_OTHERS]
LAYER_NORMS = ("gpt2", "gpt_neox", "opt")
FIXED_HEADS = ("gpt2", "gpt_neox", "opt")  # their configs have no width of a head by itself


def config_of(family: str, **values: Any) -> Any:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**sizes, **{**SIZES, **_OTHERS}.get(family, {}), **values})


def model_of(family: str, seed: int = 0, dtype: torch.dtype = torch.float64, **values: Any) -> Any:
    """Random, biases and norms too, so that none of them is without effect."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_of(family, **values), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype).eval()


def tokens(rows: int = 2, length: int = 11, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
