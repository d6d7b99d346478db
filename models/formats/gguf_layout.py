"""How the families lie in GGUF: the names of their tensors, the order of their rows, and what their config says there.

The names are the gguf package's own map. The rest follows conversion/*.py and src/models/*.cpp of
github.com/ggml-org/llama.cpp; that it is right is shown by llama.cpp's logits (tests/formats/test_gguf.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal

# O outputs of a matrix, I its inputs


@dataclass(frozen=True)
class Family:
    architecture: str  # GGUF's
    turned: bool = False  # rotary pairs are neighbours there, and half a head apart here
    norm_offset: float = 0.0  # what is added to the weights of norms
    activation: tuple[str, ...] = ("silu",)
    tied: bool = False  # the head is always the embeddings
    biases: bool = False  # attention may have some
    square_output: bool = False  # heads × width of a head is the model's width
    factors: bool = False  # a frequency of its own for every rotary pair


_TANH = ("gelu_pytorch_tanh", "gelu_new")
FAMILIES = {
    "llama": Family("llama", turned=True, biases=True, factors=True),
    "mistral": Family("llama", turned=True, factors=True),
    "mixtral": Family("llama", turned=True, factors=True),
    "qwen2": Family("qwen2", biases=True),
    "qwen3": Family("qwen3"),
    "qwen3_moe": Family("qwen3moe"),
    "gemma": Family("gemma", norm_offset=1.0, activation=_TANH, tied=True),
    "gemma2": Family("gemma2", norm_offset=1.0, activation=_TANH, tied=True),
    "phi3": Family("phi3", square_output=True),
    "gpt2": Family("gpt2", activation=_TANH, biases=True, square_output=True),
}


@dataclass(frozen=True)
class Piece:
    """A tensor of the file: these rows (of every expert), in this order, of a parameter."""

    name: str
    rows: Tensor | None = None  # Int64[O]; None: all, as they lie

    @property
    def part(self) -> str:
        """attn_v, ffn_down_exps, token_embd, …"""
        return self.name.split(".")[-2]

    @property
    def layer(self) -> int:
        return int(self.name.split(".")[1]) if self.name.startswith("blk.") else 0


@dataclass(frozen=True)
class Layout:
    architecture: str
    turned: bool
    layers: int
    heads: int
    key_heads: int
    head_width: int
    expert_width: int = 0  # channels of one expert

    def pieces(self, parameter: str) -> list[Piece]:
        """Raises Refusal for a parameter that has no place in the file."""
        stem, _, suffix = parameter.rpartition(".")
        if parameter.endswith("experts.gate_up_proj"):
            layer = parameter.split(".")[2]
            rows = torch.arange(2 * self.expert_width).view(2, -1)
            names = ("ffn_gate_exps", "ffn_up_exps")
            return [Piece(f"blk.{layer}.{name}.weight", half) for name, half in zip(names, rows, strict=True)]
        if parameter.endswith("experts.down_proj"):
            return [Piece(f"blk.{parameter.split('.')[2]}.ffn_down_exps.weight")]
        known = _names(self.architecture, self.layers).get_name(stem)
        if known is None:
            raise Refusal(f"format=gguf: {self.architecture} has no place for {parameter}; export it as huggingface")
        rows_of: Tensor | None = None
        if self.turned and known.endswith((".attn_q", ".attn_k")):
            count = self.heads if known.endswith("attn_q") else self.key_heads
            rows_of = torch.arange(count * self.head_width).view(count, 2, -1).swapaxes(1, 2).flatten()
        return [Piece(f"{known}.{suffix}", rows_of)]


@functools.cache
def _names(architecture: str, layers: int) -> Any:
    import gguf

    code = next(code for code, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(code, layers)


def layout_of_config(config: Any) -> Layout:
    family = FAMILIES[config.model_type]
    experts = getattr(config, "moe_intermediate_size", config.intermediate_size) if experts_of(config) else 0
    return Layout(
        family.architecture,
        family.turned,
        config.num_hidden_layers,
        config.num_attention_heads,
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_width(config),
        experts,
    )


def layout_of_file(reader: Any) -> Layout:
    """Of a file that gguf's reader has open."""

    def value_of(name: str, default: Any = None) -> Any:
        field = reader.get_field(name.replace("ARCH", architecture))
        return default if field is None else field.contents()

    architecture = reader.get_field("general.architecture").contents()
    heads = value_of("ARCH.attention.head_count")
    width = value_of("ARCH.attention.key_length", value_of("ARCH.embedding_length") // heads)
    experts = value_of("ARCH.expert_feed_forward_length", value_of("ARCH.feed_forward_length"))
    return Layout(
        architecture,
        architecture == "llama",
        value_of("ARCH.block_count"),
        heads,
        value_of("ARCH.attention.head_count_kv", heads),
        width,
        experts if value_of("ARCH.expert_count") else 0,
    )


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def experts_of(config: Any) -> int:
    for name in ("num_local_experts", "num_experts"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 0


def check_family(config: Any) -> Family:
    """Raises Refusal for a model that llama.cpp does not compute as transformers does."""
    kind = config.model_type
    family = FAMILIES.get(kind)
    if family is None:
        raise Refusal(
            f"format=gguf: {kind} is none of the families that are written: {', '.join(FAMILIES)}; use huggingface"
        )

    def need(held: bool, what: str) -> None:
        if not held:
            raise Refusal(f"format=gguf: llama.cpp's {family.architecture} {what}; export it as huggingface")

    act = next(
        (found for name in ("hidden_activation", "hidden_act", "activation_function")
         if (found := getattr(config, name, None)) is not None), family.activation[0],
    )  # fmt: skip
    need(act in family.activation, f"computes {family.activation[0]}, not {act}")
    need(not family.tied or config.tie_word_embeddings, "has no head of its own (tie_word_embeddings=false)")
    need(family.biases or not getattr(config, "attention_bias", False), "has no biases in its attention")
    square = config.num_attention_heads * head_width(config) == config.hidden_size
    need(not family.square_output or square, "needs heads × width of a head = hidden_size")
    rope = rope_of(config)
    if rope is not None:
        kinds = ("default", "linear", "yarn") + (("llama3",) if family.factors else ())
        need(rope["rope_type"] in kinds, f"is written with rope_type {', '.join(kinds)} only, not {rope['rope_type']}")
        turning = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
        need(turning == 1.0 or kind == "phi3", f"turns whole heads, not {turning} of them")
    if kind == "gemma2":
        usual = (
            config.hidden_size // config.num_attention_heads if config.num_hidden_layers == 46 else head_width(config)
        )
        need(config.query_pre_attn_scalar == usual, f"scales queries by {usual}, not {config.query_pre_attn_scalar}")
        need(bool(config.attn_logit_softcapping and config.final_logit_softcapping), "always caps its logits")
        windows = [each == "sliding_attention" for each in config.layer_types]
        need(windows == [at % 2 == 0 for at in range(len(windows))], "has a sliding window in every other layer")
    if kind == "qwen3_moe":
        sparse = not config.mlp_only_layers and config.decoder_sparse_step == 1
        need(sparse and config.norm_topk_prob, "has experts in all layers, and makes their shares sum to one")
    if kind == "gpt2":
        usual_scale = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        need(
            usual_scale and not config.add_cross_attention, "scales attention by the width of a head, and has no other"
        )
    return family


def rope_of(config: Any) -> dict[str, Any] | None:
    """The rotary embedding's parameters; None where positions have learned embeddings."""
    rope = getattr(config, "rope_parameters", None)
    if rope is None:
        return None
    nested = next((value for value in rope.values() if isinstance(value, dict)), None)
    return dict(nested or rope)


def context_length(config: Any) -> tuple[int, str | None]:
    """How many tokens it is written for, and why not for all of them.

    A sliding window that llama.cpp does not compute changes nothing within its length.
    """
    whole = int(config.max_position_embeddings)
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or whole
    slides = window < whole and (kinds is None or "sliding_attention" in kinds)
    if config.model_type in ("qwen2", "qwen3", "qwen3_moe") and not getattr(config, "use_sliding_window", False):
        slides = False
    if not slides or config.model_type == "gemma2":
        return whole, None
    return int(window), f"{window} of {whole} tokens: llama.cpp does not compute this family's sliding window"


def hyperparameters(writer: Any, config: Any) -> None:
    """Everything of the config that llama.cpp computes with."""
    import gguf

    kind = config.model_type
    writer.add_context_length(context_length(config)[0])
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_vocab_size(config.vocab_size)
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    width = head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    if experts := experts_of(config):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if kind == "qwen3_moe":
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "gemma2":
        writer.add_sliding_window(config.sliding_window)
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind == "phi3":
        writer.add_sliding_window(0)
    rope = rope_of(config)
    assert rope is not None
    turning = rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    writer.add_rope_dimension_count(int(width * turning))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(float(rope["factor"]))
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        tell: dict[str, Callable[[float], None]] = {
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for name, say in tell.items():
            if rope.get(name) is not None:
                say(float(rope[name]))


def extra_tensors(config: Any) -> dict[str, Tensor]:
    """Of no parameter: Llama 3's frequencies, each as what it divides the usual one by."""
    rope = rope_of(config)
    if rope is None or rope["rope_type"] != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    changed, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = head_width(config)
    usual = 1.0 / (float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    return {"rope_freqs.weight": usual / changed}
