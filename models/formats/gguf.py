"""GGUF, llama.cpp's own file: a quantized model's very integers and scales, or ggml's own rounding of plain weights."""

from __future__ import annotations

import functools
import math
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.formats.format import Finished, Format, Plan, Written
from models.formats.gguf_layout import (
    FAMILIES,
    Piece,
    check_family,
    context_length,
    experts_of,
    extra_tensors,
    head_width,
    hyperparameters,
    layout_of_config,
)
from models.formats.gguf_tokenizer import add_none, add_tokenizer, has_tokenizer
from models.formats.llama_cpp import CACHES, FILE, LlamaCpp
from models.llama_library import PINNED
from models.load import DTYPES, load_config, load_model
from models.matrices import matrices
from models.quantization.ggml import (
    FLOATS,
    LARGEST,
    MIXTURES,
    TYPES,
    Blocks,
    GgmlType,
    Mixture,
    fitting,
    packed_integers,
    type_of_scheme,
)
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# E experts, O outputs of a matrix, I its inputs, R bytes of a row

ALWAYS_F32 = ("position_embd", "ffn_gate_inp")  # as llama.cpp's own converter has them
_FILE_TYPES = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_m": 12, "q4_k_s": 14,
    "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18, "bf16": 32,
    "q3_k": 11, "q4_k": 14, "q5_k": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Gguf(Format):
    """One file for llama.cpp.

    A quantized model is packed from its own integers and fp16 scales (q4_0 up to 4 bits, q8_0 up to 8; symmetric), or
    from the ggml blocks that it was trained on; both are exact. Plain weights become `type` as llama-quantize makes it,
    embeddings and head included: its mixtures and fallbacks, ggml's own quantizer. `auto` keeps them as they are.
    """

    type: str = "auto"  # or one of f32, f16, bf16 and MIXTURES
    # What embeddings, head and skipped matrices are held in; "mixture": as llama-quantize. None: that for plain weights
    # that become one of MIXTURES, f16 for a quantized model.
    others: str | None = None
    cache: str | None = None  # what the runtime keeps keys and values in: f32, f16 (llama.cpp's default), q8_0
    needs: ClassVar[tuple[str, ...]] = ("gguf", PINNED)

    def __post_init__(self) -> None:
        types = ("auto", *FLOATS, *MIXTURES)
        if self.type not in types:
            raise Refusal(f"format.type={self.type}: need one of {', '.join(types)}")
        others = (*FLOATS, "q8_0", "q6_k", "mixture")
        if self.others is not None and self.others not in others:
            raise Refusal(f"format.others={self.others}: need one of {', '.join(others)}, or null")
        if self.cache is not None and self.cache not in CACHES:
            raise Refusal(f"format.cache={self.cache}: need one of {', '.join(CACHES)}, or null")

    @property
    def multiple(self) -> int:
        if self.type in FLOATS:
            return 1
        return TYPES[MIXTURES[self.type]].width if self.type in MIXTURES else 32

    def check(self, plan: Plan) -> None:
        check_family(plan.config)
        width = head_width(plan.config)
        if self.cache == "q8_0" and width % 32:
            raise Refusal(f"format.cache=q8_0: blocks of 32 do not divide heads {width} wide; use format.cache=f16")
        if plan.scheme is not None and plan.scheme.activations is not None:
            raise Refusal(
                "format=gguf: llama.cpp rounds activations in its own way; use format=[compressed_tensors], or "
                "quantize without activations, as quantize.scheme=w8a16 does"
            )
        if plan.blocks is not None:
            if self.type != "auto":
                raise Refusal(
                    f"format.type={self.type}: the model is quantized to ggml's {plan.blocks} already; use "
                    f"format.type=auto"
                )
            for name, (_, inputs) in plan.shapes.items():
                GgmlType(plan.blocks).check(name, inputs)
        elif plan.scheme is not None:
            exact = self.exact_for(plan.scheme.weights)
            for name, (_, inputs) in plan.shapes.items():
                if exact != "f32" and inputs % 32:
                    raise Refusal(
                        f"format.type={exact}: {name} has {inputs} inputs, which blocks of 32 do not divide; use "
                        f"format.type=f32, or prune the width with prune.multiple_of=32"
                    )
        elif self.type in MIXTURES:
            width = TYPES[MIXTURES[self.type]].width
            widths = {inputs for _, inputs in plan.shapes.values()}
            if not any(inputs % width == 0 for inputs in widths):
                fit = [name for name, base in MIXTURES.items() if any(w % TYPES[base].width == 0 for w in widths)]
                raise Refusal(
                    f"format.type={self.type}: no matrix has a multiple of {width} inputs (they have "
                    f"{', '.join(map(str, sorted(widths)))}); use format.type={' or '.join(fit) or 'f16'}, or prune "
                    f"the widths with prune.multiple_of={width}"
                )

    def exact_for(self, scheme: WeightScheme) -> str:
        """The type that holds a scheme's integers and scales to the bit. Raises Refusal where that asked for
        does not."""
        if self.type == "f32":
            return "f32"
        exact = type_of_scheme(scheme)
        if self.type in ("auto", exact) or (self.type, exact) == ("q8_0", "q4_0"):
            return exact if self.type == "auto" else self.type
        raise Refusal(
            f"format.type={self.type}: the model is quantized to {scheme.bits} bits already, and would be rounded "
            f"twice; use format.type=auto ({exact}), or give the model that was not quantized as export.model"
        )

    def write(self, finished: Finished, folder: Path) -> Written:
        import gguf

        config = load_config(str(finished.folder))
        family = check_family(config)
        writing = _Writing(self, finished, config)
        writer = gguf.GGUFWriter(None, family.architecture)
        writer.add_name(finished.name or finished.folder.resolve().name)
        writer.add_file_type(_FILE_TYPES[writing.type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        hyperparameters(writer, config)
        fallbacks = {}
        if (problem := context_length(config)[1]) is not None:
            fallbacks["context"] = problem
        held = finished.quantized or finished.blocks
        if writing.others != "mixture" and FLOATS.get(writing.others) != DTYPES[finished.dtype]:
            fallbacks["others"] = f"embeddings, head and matrices that are not quantized are {writing.others}"
        if held is not None and held.cache not in (None, self.cache):
            fallbacks["cache"] = f"the model was trained with keys and values in {held.cache}: use cache={held.cache}"
        if (problem := _add_tokenizer(writer, finished, config.vocab_size)) is not None:
            fallbacks["tokenizer"] = problem
        # What the tensors are and how large is written before them; then they are made and written one by one.
        tensors = list(writing.tensors(load_model(str(finished.folder), dtype=DTYPES[finished.dtype])))
        numbers = size = 0
        for tensor in tensors:
            code = gguf.GGMLQuantizationType[tensor.kind.upper()]
            width, width_bytes = gguf.GGML_QUANT_SIZES[code]
            count = math.prod(tensor.shape)
            taken = count // width * width_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), taken, raw_dtype=code)
            if tensor.parameter is not None:
                numbers, size = numbers + count, size + taken
                if tensor.asked != tensor.kind:
                    fallbacks[tensor.parameter] = tensor.kind
        folder.mkdir(parents=True, exist_ok=True)
        try:
            writer.write_header_to_file(folder / FILE)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for tensor in tensors:
                writer.write_tensor_data(tensor.bytes().numpy())
        finally:
            writer.close()
        rounded = held is None and (writing.type not in FLOATS or FLOATS[writing.type] != DTYPES[finished.dtype])
        otherwise = sorted({tensor.parameter for tensor in tensors if tensor.parameter and not tensor.same})
        return Written(8 * size / numbers, fallbacks, rounded, otherwise=otherwise)

    def open(self, folder: Path, device: str) -> LlamaCpp:
        return LlamaCpp(folder, device, self.cache or "f16")

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        if not has_tokenizer(folder / FILE):
            return []  # nothing in a shell takes token ids
        named = shlex.quote(f"{path}/{FILE}")
        cache = "" if self.cache is None else f" --cache-type-k {self.cache} --cache-type-v {self.cache}"
        return [
            ("llama.cpp, OpenAI-compatible server", f"llama-server --model {named} --port 8080{cache}"),
            ("llama.cpp, command line", f"llama-cli --model {named} --prompt 'Once upon a time'{cache}"),
        ]


@dataclass(frozen=True)
class _Tensor:
    """One of the file, before it is made."""

    name: str
    shape: tuple[int, ...]
    kind: str  # what it is held in
    asked: str
    parameter: str | None  # whose it is; None: of none
    same: bool  # whether it holds the parameter's own numbers
    bytes: Callable[[], Tensor]  # of any dtype, as many as the shape and kind take


class _Writing:
    """How a model's parameters are written, one after another."""

    def __init__(self, chosen: Gguf, finished: Finished, config: Any) -> None:
        self.config = config
        self.matrices: Mapping[str, QuantizedMatrix | Blocks] = {}
        self.exact: str | None = None  # what matrices quantized by a scheme are held in
        if finished.quantized is not None:
            self.matrices = finished.quantized.matrices
            self.exact = chosen.exact_for(finished.quantized.scheme.weights)
        elif finished.blocks is not None:
            self.matrices = finished.blocks.matrices
        self.dtype = DTYPES[finished.dtype]
        plain = {str(dtype).removeprefix("torch."): name for name, dtype in FLOATS.items()}[finished.dtype]
        self.quantized = bool(self.matrices)
        of_blocks = [held.type for held in self.matrices.values() if isinstance(held, Blocks)]
        usual = of_blocks[0] if of_blocks else self.exact or plain
        self.type = usual if chosen.type == "auto" or self.quantized else chosen.type
        usual = "f16" if self.quantized else "mixture"
        self.others = chosen.others or (self.type if self.type in FLOATS else usual)
        self.layout = layout_of_config(config)
        self.offset = FAMILIES[config.model_type].norm_offset
        keys = self.layout.heads // self.layout.key_heads
        seventy = config.model_type in ("llama", "mistral", "qwen2") and self.layout.layers == 80
        self.mixture = Mixture(
            self.type if self.type in MIXTURES else "q8_0",
            self.layout.layers,
            keys,
            experts_of(config),
            seventy and (keys > 1 or config.model_type == "qwen2"),
        )

    def tensors(self, model: Any) -> Iterator[_Tensor]:
        transposed = {matrix.parameter for matrix in matrices(model) if matrix.transposed}
        for parameter, weight in model.named_parameters():  # the embeddings once, where the head is tied to them
            whole = weight.detach().transpose(-1, -2) if parameter in transposed else weight.detach()
            for piece in self.layout.pieces(parameter):
                shape = list(whole.shape)
                if whole.ndim > 1 and piece.rows is not None:
                    shape[-2] = len(piece.rows)
                asked, kind = self._kinds(parameter, piece, tuple(shape))
                make = functools.partial(self._bytes, parameter, piece, whole, kind)
                moved = self.offset and piece.part.endswith("norm")
                same = kind == "f32" or FLOATS.get(kind) == self.dtype
                same = self._held(parameter) is not None or (same and not moved)
                yield _Tensor(piece.name, tuple(shape), kind, asked, parameter, same, make)
        for name, values in extra_tensors(self.config).items():
            yield _Tensor(name, tuple(values.shape), "f32", "f32", None, True, functools.partial(torch.clone, values))

    def _kinds(self, parameter: str, piece: Piece, shape: tuple[int, ...]) -> tuple[str, str]:
        """(the type that was asked for, the type that its width allows)."""
        part = piece.part
        if len(shape) == 1 or part in ALWAYS_F32:
            return "f32", "f32"
        if (held := self._held(parameter)) is not None:
            kind = held.type if isinstance(held, Blocks) else self.type
            return kind, kind
        asked = self.type
        if part in ("token_embd", "output"):
            asked = self._of_others("output" if part == "output" or self.config.tie_word_embeddings else part, 0)
        elif self.quantized:
            asked = self._of_others(part, piece.layer)
        elif self.type in MIXTURES:
            asked = self.mixture.type_of(part, piece.layer)
        return asked, asked if asked in FLOATS else fitting(asked, shape[-1])

    def _of_others(self, part: str, layer: int) -> str:
        if self.others != "mixture":
            return self.others
        return self.mixture.type_of(part, layer) if self.type in MIXTURES else self.type

    def _held(self, parameter: str) -> QuantizedMatrix | Blocks | None:
        name = parameter if parameter in self.matrices else f"{parameter}[0]"
        return self.matrices.get(name)

    def _bytes(self, parameter: str, piece: Piece, whole: Tensor, kind: str) -> Tensor:
        if self._held(parameter) is not None:
            names = [parameter] if whole.ndim == 2 else [f"{parameter}[{slot}]" for slot in range(len(whole))]
            made = [self._exactly(self.matrices[name], kind) for name in names]
            held = made[0] if whole.ndim == 2 else torch.stack(made)
            return held if piece.rows is None else held[..., piece.rows, :]
        weight = whole
        if piece.rows is not None:
            weight = weight[piece.rows] if weight.ndim == 1 else weight[..., piece.rows, :]
        if self.offset and piece.part.endswith("norm"):
            weight = weight.float() + self.offset
        if kind not in ("f32", "bf16") and not bool((weight.abs() <= LARGEST).all()):
            setting = "others" if self.quantized or piece.part in ("token_embd", "output") else "type"
            raise Refusal(
                f"format=gguf: {parameter} has weights beyond {LARGEST:.0f} or no numbers, where half precision ends; "
                f"use format.{setting}=bf16"
            )
        if kind not in FLOATS:
            return GgmlType(kind).pack(weight.flatten(0, -2)).bytes
        held = weight.to(FLOATS[kind]).contiguous()
        return held.view(torch.int16) if kind == "bf16" else held  # numpy has no bfloat16

    @staticmethod
    def _exactly(held: QuantizedMatrix | Blocks, kind: str) -> Tensor:
        if isinstance(held, Blocks):
            return held.bytes
        return held.dequantized() if kind == "f32" else packed_integers(held, kind).bytes


def _add_tokenizer(writer: Any, finished: Finished, vocabulary: int) -> str | None:
    from transformers import AutoTokenizer

    if not (finished.folder / "tokenizer.json").is_file():  # transformers would make an empty one of nothing
        add_none(writer)
        return "token ids only: the model has no tokenizer.json"
    tokenizer = AutoTokenizer.from_pretrained(finished.folder, local_files_only=True)
    return add_tokenizer(writer, tokenizer, vocabulary, finished.texts)
