"""compressed-tensors: integers and scales as vLLM, TGI and transformers read them.

Weights alone in 2 to 8 bits, packed without gaps (pack-quantized); or 8 bits with activations in 8 bits, by the scale
of every token or by static ones (int-quantized).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Problems
from models.formats.checkpoint import dtype_of, rewritten
from models.formats.container import changed, check_scales, left_out, quantized_of, scales_OG, scheme_of
from models.formats.format import Finished, Format, Plan, Runtime, Written
from models.formats.loaded import loaded
from models.load import load_config
from models.quantization.scheme import Activations, QuantizedMatrix

_NAME = "compressed_tensors"

# O outputs of a matrix, I its inputs, G groups of I


@dataclass(frozen=True)
class _WholeRange(Activations):
    """How the library under transformers scales a token: by 2 max |x| / 255, so that its largest number falls between
    the two ends. vLLM's kernels have max |x| / 127, as `Activations` does."""

    def scale(self, largest: Tensor) -> Tensor:
        scale = largest.float() * 2 / (2**self.bits - 1)
        return torch.where(scale == 0, 1.0, scale)


@dataclass(frozen=True)
class CompressedTensors(Format):
    needs: ClassVar[tuple[str, ...]] = ("compressed-tensors",)

    def check(self, plan: Plan) -> None:
        scheme = scheme_of(plan, _NAME)
        weights, activations, problems = scheme.weights, scheme.activations, Problems()
        if not weights.symmetric:
            problems.add(
                f"format={_NAME}: asymmetric weights are not opened again by transformers; quantize with "
                f"quantize.scheme.weights.symmetric=true, or use format=[awq] or format=[torchao]"
            )
        with problems:
            check_scales(plan, weights, _NAME)
        if activations is not None and (activations.bits, weights.bits, weights.granularity == "group") != (
            8,
            8,
            False,
        ):
            problems.add(
                f"format={_NAME}: weights of {weights.bits} bits by {weights.granularity} with activations of "
                f"{activations.bits}; need 8 and 8 bits, by channel or tensor, as quantize.scheme=w8a8 has them"
            )
        problems.tell()

    def write(self, finished: Finished, folder: Path) -> Written:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        held = quantized_of(finished)
        weights, activations = held.scheme.weights, held.scheme.activations

        def packed(name: str, quantized: QuantizedMatrix) -> dict[str, Tensor]:
            integers, scale = quantized.integers.to(torch.int8), scales_OG(quantized, weights.scale_dtype)
            if activations is None:
                shape = torch.tensor(integers.shape)
                return {
                    "weight_packed": pack_to_int32(integers, weights.bits),
                    "weight_scale": scale,
                    "weight_shape": shape,
                }
            parts = {"weight": integers, "weight_scale": scale}
            if not activations.dynamic:
                parts["input_scale"] = held.input_scales[name].reshape(1).to(torch.float32)
            return parts

        additions = {"dtype": finished.dtype, "quantization_config": self._config(finished)}
        bits = rewritten(finished.folder, folder, changed(finished, packed), additions)
        if activations is None or not activations.dynamic:
            return Written(bits, activations=activations)
        other = "transformers scales the activations of a token by 2 max |x| / 255, vLLM by max |x| / 127"
        return Written(bits, {"activations": other}, activations=_WholeRange())

    def _config(self, finished: Finished) -> dict[str, Any]:
        from compressed_tensors.quantization import QuantizationConfig

        held = finished.quantized
        assert held is not None
        scheme, activations = held.scheme.weights, held.scheme.activations
        weights: dict[str, Any] = {"num_bits": scheme.bits, "type": "int", "symmetric": True, "strategy": "channel"}
        if scheme.granularity == "group":
            weights |= {"strategy": "group", "group_size": scheme.group_size}
        group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if activations is not None:
            group["input_activations"] = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token" if activations.dynamic else "tensor",
                "dynamic": activations.dynamic,
            }
        config = QuantizationConfig(
            config_groups={"group_0": group},
            ignore=left_out(load_config(str(finished.folder)), held.matrices),
            format="pack-quantized" if activations is None else "int-quantized",
            quantization_status="compressed",
        )
        found: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
        return found

    def open(self, folder: Path, device: str) -> Runtime:
        return loaded(folder, device)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        config = load_config(str(folder))
        scheme, dtype = config.quantization_config["config_groups"]["group_0"], dtype_of(config)
        bits, group = scheme["weights"]["num_bits"], scheme["weights"].get("group_size")
        named = shlex.quote(path)
        half = "bfloat16" if dtype == "bfloat16" else "float16"  # vLLM's kernels have no other
        commands = [("transformers", f"transformers serve {named} --dtype {dtype}")]
        if bits in (4, 8) and group in (None, 32, 64, 128):  # what vLLM's kernels take
            commands.append(("vLLM", f"vllm serve {named} --dtype {half}"))
            commands.append(("TGI", f"text-generation-launcher --model-id {named} --dtype {half}"))
        return commands
