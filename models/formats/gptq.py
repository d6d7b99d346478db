"""GPTQ's file layout as AutoGPTQ wrote it first (v1), which transformers, vLLM and TGI read.

Of a matrix with O outputs, I inputs and b bits, all integers from 0 up, symmetric ones with the zero point 2^(b−1):

    qweight  Int32[I·b/32, O]   bit k of column o's integers, laid end to end, is bit k % 32 of word k / 32
    qzeros   Int32[G, O·b/32]   zero points less one, packed likewise along the outputs
    scales   Float16[G, O]
    g_idx    Int32[I]           the group of each input; neighbours, as no order of columns is needed (desc_act false)
"""

from __future__ import annotations

import json
import math
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

_NAME = "gptq"
_PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 3, 4, 8)
_KERNELS = (32, 64, 128)  # group sizes that vLLM's Marlin kernels take

# O outputs of a matrix, I its inputs, G groups of I, W words of 32 bits


@dataclass(frozen=True)
class GPTQ(Format):
    """Weights alone, symmetric, in 2, 3, 4 or 8 bits."""

    @property
    def multiple(self) -> int:
        return 32  # then integers of any number of bits fill whole words

    def check(self, plan: Plan) -> None:
        scheme = scheme_of(plan, _NAME)
        weights, problems = scheme.weights, Problems()
        if weights.bits not in _BITS:
            *some, last = map(str, _BITS)
            problems.add(
                f"format={_NAME}: it has no {weights.bits} bits; quantize with quantize.scheme.weights.bits="
                f"{', '.join(some)} or {last}, or use format=[compressed_tensors]"
            )
        if not weights.symmetric:
            problems.add(
                f"format={_NAME}: scheme.weights.symmetric=false, and a zero point of 0 cannot be expressed there; use "
                f"format=[awq], or quantize with quantize.scheme.weights.symmetric=true"
            )
        check_float16(problems, scheme, _NAME)
        with problems:
            word = math.lcm(32, weights.bits) // weights.bits
            check_divides(plan, _NAME, word, word)
        problems.tell()

    def write(self, finished: Finished, folder: Path) -> Written:
        held = quantized_of(finished)
        weights = held.scheme.weights

        def packed(name: str, quantized: QuantizedMatrix) -> dict[str, Tensor]:
            zero = 2 ** (weights.bits - 1)
            scales_GO = scales_OG(quantized, "float16").T.contiguous()
            zeros_OG = torch.full_like(scales_GO.T, zero - 1, dtype=torch.int32)
            inputs = quantized.integers.shape[1]
            return {
                "qweight": _words(quantized.integers.T + zero, weights.bits),
                "qzeros": _words(zeros_OG, weights.bits).T.contiguous(),
                "scales": scales_GO,
                "g_idx": torch.arange(inputs, dtype=torch.int32) // (inputs // len(scales_GO)),
            }

        config = {
            "quant_method": "gptq",
            "bits": weights.bits,
            "group_size": weights.group_size or -1,
            "sym": True,
            "desc_act": False,
            "static_groups": True,
            "true_sequential": True,
            "damp_percent": 0.01,
            "lm_head": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
        }
        plain = load_config(str(finished.folder))
        if skipped := [name for name in left_out(plain, held.matrices) if _in_layers(name, held.matrices)]:
            # GPTQModel and vLLM leave out what these expressions match; other runtimes ignore them (see serving)
            config["dynamic"] = {f"-:^{name.replace('.', chr(92) + '.')}$": {} for name in skipped}
        additions = {"dtype": finished.dtype, "quantization_config": config}
        bits = rewritten(finished.folder, folder, changed(finished, packed), additions)
        (folder / "quantize_config.json").write_text(json.dumps(config, indent=2) + "\n")  # AutoGPTQ's own name for it
        return Written(bits)

    def open(self, folder: Path, device: str) -> Runtime:
        return unpacked(folder, device, _PARTS, _weight)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        named = shlex.quote(path)
        config = load_config(str(folder)).quantization_config
        whole = "dynamic" not in config
        commands = []
        if config["bits"] in (4, 8) and config["group_size"] in (-1, *_KERNELS):
            commands.append(("vLLM", f"vllm serve {named} --dtype float16"))
            if whole:
                commands.append(("TGI", f"text-generation-launcher --model-id {named} --quantize gptq --dtype float16"))
        commands.append(
            ("transformers, with pip install optimum gptqmodel", f"transformers serve {named} --dtype float16")
        )
        return commands


def _in_layers(name: str, matrices: Any) -> bool:
    """Whether a module lies among the quantized ones: the head does not, and GPTQ never takes it."""
    return name.split(".")[0] in {each.split(".")[0] for each in matrices}


def _words(integers_NC: Tensor, bits: int) -> Tensor:
    """Int32[N·bits/32, C]: each column's integers end to end, the lowest bit first."""
    places = torch.arange(len(integers_NC)) * bits
    words_WC = torch.zeros(len(integers_NC) * bits // 32, integers_NC.shape[1], dtype=torch.int64)
    for shift in range(bits):  # bit by bit: an integer of 3 bits may lie in two words
        bit_NC = (integers_NC.long() >> shift) & 1
        at = places + shift
        words_WC.index_add_(0, at // 32, bit_NC << (at % 32)[:, None])
    return torch.where(words_WC >= 2**31, words_WC - 2**32, words_WC).int()


def _weight(parts: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """Float32[O, I], by the layout alone: nothing of how it was written is used."""
    bits, scales_GO = int(config["bits"]), parts["scales"].float().numpy()
    inputs = parts["g_idx"].shape[0]

    def integers(words_WC: np.ndarray, count: int) -> np.ndarray:
        """Int[count, C]."""
        lines = np.ascontiguousarray(words_WC.T).astype("<i4").view(np.uint8)
        stream = np.unpackbits(lines, axis=1, bitorder="little")[:, : count * bits].reshape(len(lines), count, bits)
        found: np.ndarray = (stream.astype(np.int64) @ (1 << np.arange(bits))).T
        return found

    weight_IO = integers(parts["qweight"].numpy(), inputs)
    zero_GO = integers(parts["qzeros"].numpy().T, scales_GO.shape[1]).T + 1
    group_I = parts["g_idx"].numpy()
    return torch.from_numpy((scales_GO[group_I] * (weight_IO - zero_GO[group_I]).astype(np.float32)).T.copy())
