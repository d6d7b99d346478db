"""Keys and values as a cache in 8 bits returns them: llama.cpp's q8_0 (--cache-type-k q8_0 --cache-type-v q8_0)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.errors import Refusal
from models.quantization.straight_through import straight_through
from models.representations import projection_widths

CACHES = ("q8_0",)
_BLOCK = 32  # neighbours in a head that share a scale

_TURNED = ("llama", "mistral", "mixtral")  # in GGUF their rotary pairs are neighbours, here half a head apart

# B sequences, H key or value heads, T tokens, D width of a head


def rounded(heads_BHTD: Tensor) -> Tensor:
    """d = max |x| / 127 of each block, held in fp16; q = round(x / d), halves away from zero (ggml's
    quantize_row_q8_0_ref). In the dtype of what is given; to the backward it is what is given."""
    exact = heads_BHTD.detach().float().unflatten(-1, (-1, _BLOCK))
    scale = exact.abs().amax(-1, keepdim=True) / 127
    integers = exact * torch.where(scale == 0, 0.0, 1 / scale)
    integers = integers.sign() * (integers.abs() + 0.5).floor()
    found = (integers * scale.half().float()).flatten(-2).to(heads_BHTD)
    return straight_through(heads_BHTD, found)


def keys_as_cached(keys_BHTD: Tensor, turned: bool) -> Tensor:
    """As llama.cpp keeps keys: in its own order of channels, and where heads are a multiple of 64 wide spread over the
    head by a Hadamard rotation (its attn_rot), which queries get too, before they are rounded."""
    width = keys_BHTD.shape[-1]
    order_D = torch.arange(width).view(2, -1).T.flatten() if turned else torch.arange(width)
    found = _rounded_rotated(keys_BHTD[..., order_D], width & -width)
    return found[..., order_D.argsort()]


def values_as_cached(values_BHTD: Tensor) -> Tensor:
    return _rounded_rotated(values_BHTD, 64)


def _rounded_rotated(heads_BHTD: Tensor, size: int) -> Tensor:
    """Rounded behind a rotation of `size` neighbours each, and turned back; without one where heads are narrow."""
    if heads_BHTD.shape[-1] % 64:
        return rounded(heads_BHTD)
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    matrix = (matrix / size**0.5).to(heads_BHTD)

    def turned(heads: Tensor) -> Tensor:
        return (heads.unflatten(-1, (-1, size)) @ matrix).flatten(-2)

    return turned(rounded(turned(heads_BHTD)))  # the matrix is its own inverse


def check(config: Any, cache: str, setting: str) -> None:
    """Raises Refusal where a head is not made of whole blocks."""
    if cache not in CACHES:
        raise Refusal(f"{setting}={cache}: need one of {', '.join(CACHES)}, or null")
    queries, _, _ = projection_widths(config)
    width = queries // config.num_attention_heads
    if width % _BLOCK:
        raise Refusal(f"{setting}={cache}: heads are {width} wide, and a block is {_BLOCK}; set {setting}=null")


def attach(model: Any) -> str:
    """From now on attention gets keys and values rounded as the cache holds them, after their rotation. Returns the
    name of the attention before, for `detach`. Raises Refusal for attention whose keys and values cannot be reached."""
    before: str = model.config._attn_implementation
    if before not in ALL_ATTENTION_FUNCTIONS:
        raise Refusal(
            f"trainer.attention={before}: its keys and values cannot be reached; use sdpa or flash_attention_2"
        )
    turned = model.config.model_type in _TURNED
    name, whole = f"{before}_q8_0_cache{'_turned' if turned else ''}", ALL_ATTENTION_FUNCTIONS[before]

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *positional: Any, **words: Any) -> Any:
        return whole(module, query, keys_as_cached(key, turned), values_as_cached(value), *positional, **words)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.config._attn_implementation = name
    return before


def detach(model: Any, before: str) -> None:
    model.config._attn_implementation = before
