"""ggml's own rounding: blocks of neighbours in its binary layouts, made by its own code (models.llama_library).

Layouts: ggml-common.h of github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal
from models.llama_library import library, row_reader
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# O outputs of a matrix, I its inputs, N blocks of a row, R bytes of a row


@dataclass(frozen=True)
class _Layout:
    code: int  # of ggml_type
    width: int  # neighbours of a block
    bytes: int  # of a block
    function: str  # of ggml, that reads such blocks


TYPES = {
    "q4_0": _Layout(2, 32, 18, "q4_0"),
    "q4_1": _Layout(3, 32, 20, "q4_1"),
    "q5_0": _Layout(6, 32, 22, "q5_0"),
    "q5_1": _Layout(7, 32, 24, "q5_1"),
    "q8_0": _Layout(8, 32, 34, "q8_0"),
    "q2_k": _Layout(10, 256, 84, "q2_K"),
    "q3_k": _Layout(11, 256, 110, "q3_K"),
    "q4_k": _Layout(12, 256, 144, "q4_K"),
    "q5_k": _Layout(13, 256, 176, "q5_K"),
    "q6_k": _Layout(14, 256, 210, "q6_K"),
}
FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LARGEST = 65504.0  # scales of blocks are of half precision; ggml ends the process over what has none


@dataclass(frozen=True)
class Blocks:
    """A matrix [O, I] as ggml holds it."""

    type: str  # of TYPES
    bytes: Tensor  # Uint8[O, R]

    @property
    def shape(self) -> tuple[int, int]:
        rows, row_bytes = self.bytes.shape
        return rows, row_bytes // TYPES[self.type].bytes * TYPES[self.type].width

    def dequantized(self) -> Tensor:
        """Float32[O, I], by ggml itself."""
        layout = TYPES[self.type]
        source = self.bytes.cpu().contiguous()
        rows, row_bytes = source.shape
        values = torch.empty(rows, row_bytes // layout.bytes * layout.width)
        read = row_reader(layout.function)

        def some(first: int, count: int) -> None:
            read(source[first:].data_ptr(), values[first:].data_ptr(), count * values.shape[1])

        _shared(some, rows)
        return values

    def bits(self) -> int:
        return self.bytes.numel() * 8


@dataclass(frozen=True)
class GgmlType:
    """One of ggml's block types, as a function from weights to the weights that llama.cpp will multiply with."""

    type: str = "q4_k"

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise Refusal(f"ggml.type={self.type}: need one of {', '.join(TYPES)}")

    @property
    def width(self) -> int:
        """How many neighbours make a block."""
        return TYPES[self.type].width

    @property
    def bits_per_weight(self) -> float:
        return TYPES[self.type].bytes * 8 / self.width

    def check(self, name: str, inputs: int) -> None:
        """Raises Refusal where blocks do not divide the inputs of a matrix, with the types whose blocks do."""
        if inputs % self.width:
            fit = [known for known, layout in TYPES.items() if inputs % layout.width == 0]
            raise Refusal(
                f"ggml.type={self.type}: {name} has {inputs} inputs, which blocks of {self.width} do not divide; "
                f"need {' or '.join(fit) or 'f16'}, or prune the width with prune.multiple_of={self.width}"
            )

    def pack(self, weight_OI: Tensor) -> Blocks:
        """By ggml's own quantizer, without an importance matrix. Raises Refusal for weights that are no numbers or
        beyond half precision, over which ggml would end the process."""
        source = weight_OI.detach().to("cpu", torch.float32).contiguous()
        rows, inputs = source.shape
        self.check("a matrix", inputs)
        if not bool((source.abs() <= LARGEST).all()):
            raise Refusal(f"ggml.type={self.type}: a weight is NaN, infinite or beyond {LARGEST:.0f}")
        layout = TYPES[self.type]
        packed = torch.empty(rows, inputs // layout.width * layout.bytes, dtype=torch.uint8)
        write = library().ggml_quantize_chunk

        def some(first: int, count: int) -> None:
            write(layout.code, source.data_ptr(), packed.data_ptr(), first * inputs, count, inputs, None)

        _shared(some, rows)
        return Blocks(self.type, packed)

    def rounded(self, weight_OI: Tensor) -> Tensor:
        """Float[O, I] in the weight's dtype, on its device: packed and dequantized."""
        return self.pack(weight_OI).dequantized().to(weight_OI)


def _shared(work: Any, rows: int) -> None:
    """`work(first, count)` over all rows, by as many threads as torch has: ctypes lets go of the interpreter."""
    threads = max(1, min(torch.get_num_threads(), rows))
    if threads == 1:
        return work(0, rows)
    bounds = [rows * at // threads for at in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, a, b - a) for a, b in itertools.pairwise(bounds)]:
            done.result()
    return None


def type_of_scheme(scheme: WeightScheme) -> str:
    """The smallest type whose blocks hold a scheme's own integers and scales. Raises Refusal where none does."""
    if not scheme.symmetric:
        raise Refusal(
            "format=gguf: blocks hold −scale · zero point in half precision, which is not exact; quantize with "
            "quantize.scheme.weights.symmetric=true, or use format.type=f32"
        )
    if scheme.scale_dtype != "float16":
        raise Refusal(
            f"format=gguf: blocks hold scales in float16, not {scheme.scale_dtype}; quantize with "
            f"quantize.scheme.weights.scale_dtype=float16, or use format.type=f32"
        )
    if scheme.group_size is not None and scheme.group_size % 32:
        raise Refusal(
            f"format=gguf: blocks are of 32 neighbours; scheme.weights.group_size={scheme.group_size} is no multiple "
            f"of 32; quantize with quantize.scheme.weights.group_size=32, or use format.type=f32"
        )
    return "q4_0" if scheme.bits <= 4 else "q8_0"


def packed_integers(quantized: QuantizedMatrix, kind: str) -> Blocks:
    """The very integers and scales of a symmetric scheme as q4_0 (up to 4 bits) or q8_0; nothing is rounded."""
    outputs, inputs = quantized.integers.shape
    blocks = inputs // 32
    scale = quantized.scale.cpu()
    scale_ON = scale.expand(outputs, -1).repeat_interleave(blocks // scale.shape[1], dim=1)
    scale_ONB = scale_ON.to(torch.float16)[..., None].contiguous().view(torch.uint8)
    integers_ONW = quantized.integers.cpu().unflatten(1, (blocks, 32))
    if kind == "q4_0":
        shifted = (integers_ONW + 8).to(torch.uint8)
        held = shifted[..., :16] | (shifted[..., 16:] << 4)
    elif kind == "q8_0":
        held = integers_ONW.to(torch.int8).view(torch.uint8)
    else:
        raise ValueError(f"{kind} holds no integers of a scheme; need q4_0 or q8_0")
    return Blocks(kind, torch.cat([scale_ONB, held], dim=-1).flatten(1))


@dataclass(frozen=True)
class Mixture:
    """Which type llama-quantize gives which matrix, without an importance matrix.

    llama_tensor_get_type of src/llama-quant.cpp. `parts` are GGUF's own: attn_v, attn_qkv, ffn_down, output, …
    """

    name: str  # of MIXTURES
    layers: int
    query_heads_per_key: int = 1
    experts: int = 0
    seventy: bool = False  # llama.cpp's 70B: 80 layers and shared keys

    def type_of(self, part: str, layer: int) -> str:
        """Before it is known what fits: see `fitting`."""
        base, more = MIXTURES[self.name], self._more_bits(layer)
        eighth, medium = self.layers // 8, self.name in ("q4_k_m", "q5_k_m")
        if part == "output":
            return base if base == "q8_0" else "q6_k"
        if part in ("attn_v", "attn_qkv"):
            chosen = base
            if self.name == "q2_k":
                chosen = "q4_k" if self.query_heads_per_key >= 4 else "q3_k"
            elif self.name == "q3_k_m":
                chosen = "q5_k" if layer < 2 else "q4_k"
            elif medium and more:
                chosen = "q6_k"
            elif self.name == "q4_k_s" and layer < 4:
                chosen = "q5_k"
            if self.seventy and chosen in ("q3_k", "q4_k"):
                chosen = "q5_k"
            return "q8_0" if self.experts == 8 else chosen
        if part == "attn_k" and self.experts == 8:
            return "q8_0"
        if part.startswith("ffn_down"):
            if self.name == "q2_k":
                return "q3_k"
            if self.name == "q3_k_m":
                return "q5_k" if layer < self.layers // 16 else "q4_k"
            if medium and more:
                return "q6_k"
            return "q5_k" if self.name == "q4_k_s" and layer < eighth else base
        if part == "attn_output":
            if self.experts == 8 and self.name in ("q2_k", "q3_k_m", "q4_k_s", "q4_k_m"):
                return "q5_k"
            return {"q2_k": "q3_k", "q3_k_m": "q4_k"}.get(self.name, base)
        return base

    def _more_bits(self, layer: int) -> bool:
        eighth = self.layers // 8
        return layer < eighth or layer >= 7 * self.layers // 8 or (layer - eighth) % 3 == 2


MIXTURES = {
    **{name: name for name in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q6_k")},
    "q3_k_m": "q3_k", "q4_k_s": "q4_k", "q4_k_m": "q4_k", "q5_k_s": "q5_k", "q5_k_m": "q5_k",
}  # fmt: skip
_SMALLER_BLOCKS = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


def fitting(kind: str, inputs: int) -> str:
    """`kind`, or what llama-quantize takes in its place for a width that its blocks do not divide."""
    tried: Sequence[str] = (kind, _SMALLER_BLOCKS.get(kind, kind))
    return next((known for known in tried if inputs % TYPES[known].width == 0), "f16")
