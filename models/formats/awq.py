"""AutoAWQ's file layout for matrix products (GEMM): 4 bits from 0 up, a zero point for each group.

qweight  Int32[I, O/8]   eight outputs in a word, from the lowest bits up: 0, 2, 4, 6, 1, 3, 5, 7
qzeros   Int32[G, O/8]   likewise
scales   Float16[G, O]
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import Problems
from models.formats.checkpoint import rewritten
from models.formats.container import changed, check_divides, check_float16, left_out, quantized_of, scales_OG, scheme_of
from models.formats.format import Finished, Format, Plan, Runtime, Written
from models.formats.unpacked import unpacked
from models.load import load_config
from models.quantization.scheme import QuantizedMatrix

_NAME = "awq"
_PARTS = ("qweight", "qzeros", "scales")
_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

# O outputs of a matrix, I its inputs, G groups of I


@dataclass(frozen=True)
class AWQ(Format):
    """A symmetric scheme is held with the zero point 8."""

    @property
    def multiple(self) -> int:
        return 8  # outputs that share a word

    def check(self, plan: Plan) -> None:
        scheme = scheme_of(plan, _NAME)
        weights, problems = scheme.weights, Problems()
        if weights.bits != 4:
            problems.add(
                f"format={_NAME}: it has no {weights.bits} bits; quantize with quantize.scheme.weights.bits=4, or use "
                f"format=[compressed_tensors] (2 to 8 bits)"
            )
        check_float16(problems, scheme, _NAME)
        with problems:
            check_divides(plan, _NAME, 8, 1)
        problems.tell()

    def write(self, finished: Finished, folder: Path) -> Written:
        held = quantized_of(finished)
        weights = held.scheme.weights
        up = 8 if weights.symmetric else 0

        def packed(name: str, quantized: QuantizedMatrix) -> dict[str, Tensor]:
            scales_GO = scales_OG(quantized, "float16").T.contiguous()
            zero_GO = (quantized.zero_point + up).expand(scales_GO.T.shape).T
            return {
                "qweight": _words(quantized.integers.T + up),
                "qzeros": _words(zero_GO),
                "scales": scales_GO,
            }

        config = {
            "quant_method": "awq",
            "bits": 4,
            "group_size": weights.group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": left_out(load_config(str(finished.folder)), held.matrices),
        }
        additions = {"dtype": finished.dtype, "quantization_config": config}
        return Written(rewritten(finished.folder, folder, changed(finished, packed), additions))

    def open(self, folder: Path, device: str) -> Runtime:
        return unpacked(folder, device, _PARTS, _weight)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        named = shlex.quote(path)
        commands = []
        if load_config(str(folder)).quantization_config["group_size"] in (32, 64, 128):
            commands.append(("vLLM", f"vllm serve {named} --dtype float16"))
            commands.append(("TGI", f"text-generation-launcher --model-id {named} --quantize awq --dtype float16"))
        commands.append(("transformers, with pip install gptqmodel", f"transformers serve {named} --dtype float16"))
        return commands


def _words(integers_NO: Tensor) -> Tensor:
    """Int32[N, O/8]."""
    eights_NWE = integers_NO.long().unflatten(1, (-1, 8))[..., list(_ORDER)]
    words_NW = (eights_NWE << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words_NW >= 2**31, words_NW - 2**32, words_NW).int().contiguous()


def _weight(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Float32[O, I], by the layout alone: nothing of how it was written is used."""

    def integers(words: Tensor) -> np.ndarray:
        held = np.ascontiguousarray(words.numpy()).astype("<i4").view(np.uint8)  # four bytes of two outputs each
        # The low halves of the four bytes are outputs 0, 4, 1 and 5, the high ones 2, 6, 3 and 7.
        halves = np.stack([held & 15, held >> 4], axis=-1).reshape(*words.shape, 8)
        found = np.empty_like(halves)
        for place, output in enumerate(_ORDER):
            found[..., output] = halves[..., place]
        return found.reshape(words.shape[0], -1).astype(np.float32)

    scales_GO = parts["scales"].float().numpy()
    weight_IO, zero_GO = integers(parts["qweight"]), integers(parts["qzeros"])
    width = len(weight_IO) // len(scales_GO)
    whole_IO = np.repeat(scales_GO, width, 0) * (weight_IO - np.repeat(zero_GO, width, 0))
    return torch.from_numpy(whole_IO.T.copy())
