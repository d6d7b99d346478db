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

from models.errors import Refusal
from models.formats.checkpoint import rewritten
from models.formats.container import changed, check_scales, grid_of, left_out, record_of, scales_OG
from models.formats.format import Finished, Plan, Runtime, Written
from models.formats.loaded import loaded
from models.load import load_config
from models.quantization.activations import Activations
from models.quantization.grid import Quantized

_NAME = "compressed_tensors"

# O what a matrix gives, I what it reads, G groups of I


@dataclass(frozen=True)
class _WholeRange(Activations):
    """How the library under transformers scales a token: its largest number falls between the two ends, 2 max |x| /
    255. vLLM's kernels have max |x| / 127, as here."""

    def scale(self, largest: Tensor) -> Tensor:
        scale = largest.float() * 2 / (2**self.bits - 1)
        return torch.where(scale == 0, 1.0, scale)


@dataclass(frozen=True)
class CompressedTensors:
    needs: ClassVar[tuple[str, ...]] = ("compressed-tensors",)

    def check(self, plan: Plan) -> None:
        grid = grid_of(plan, _NAME)
        if not grid.symmetric:
            raise Refusal(
                f"format={_NAME}: asymmetric weights are not opened again by transformers; quantize with "
                f"grid.symmetric=true, or use format=awq or torchao"
            )
        check_scales(plan, grid, _NAME)
        if plan.activations is None:
            return
        if plan.activations.bits != 8 or grid.bits != 8 or grid.granularity == "group":
            raise Refusal(
                f"format={_NAME}: weights of {grid.bits} bits by {grid.granularity} with activations of "
                f"{plan.activations.bits}; need 8 and 8 bits, by channel or tensor"
            )

    def write(self, finished: Finished, folder: Path) -> Written:
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        record = record_of(finished)
        grid = record.grid

        def packed(name: str, quantized: Quantized) -> dict[str, Tensor]:
            integers, scale = quantized.integers.to(torch.int8), scales_OG(quantized, grid.scale_dtype)
            if record.activations is None:
                shape = torch.tensor(integers.shape)
                return {
                    "weight_packed": pack_to_int32(integers, grid.bits),
                    "weight_scale": scale,
                    "weight_shape": shape,
                }
            held = {"weight": integers, "weight_scale": scale}
            if not record.activations.dynamic:
                held["input_scale"] = record.input_scales[name].reshape(1).to(torch.float32)
            return held

        said = {"dtype": finished.dtype, "quantization_config": self._said(finished)}
        bits, trained = rewritten(finished.folder, folder, changed(finished, packed), said), record.activations
        if trained is None or not trained.dynamic:
            return Written(bits, activations=trained)
        other = "transformers has scales of 2 max |x| / 255 for each token that matrices read, vLLM max |x| / 127"
        return Written(bits, {"activations": other}, activations=_WholeRange())

    def _said(self, finished: Finished) -> dict[str, Any]:
        from compressed_tensors.quantization import QuantizationConfig

        record = finished.record
        assert record is not None
        grid, activations = record.grid, record.activations
        weights: dict[str, Any] = {"num_bits": grid.bits, "type": "int", "symmetric": True, "strategy": "channel"}
        if grid.granularity == "group":
            weights |= {"strategy": "group", "group_size": grid.group_size}
        scheme: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
        if activations is not None:
            scheme["input_activations"] = {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token" if activations.dynamic else "tensor",
                "dynamic": activations.dynamic,
            }
        config = QuantizationConfig(
            config_groups={"group_0": scheme},
            ignore=left_out(load_config(str(finished.folder)), record.matrices),
            format="pack-quantized" if activations is None else "int-quantized",
            quantization_status="compressed",
        )
        found: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
        return found

    def open(self, folder: Path, device: str) -> Runtime:
        return loaded(folder, device)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        named = shlex.quote(path)
        scheme = load_config(str(folder)).quantization_config["config_groups"]["group_0"]
        bits, group = scheme["weights"]["num_bits"], scheme["weights"].get("group_size")
        told = [("transformers", f"transformers serve {named}")]
        if bits in (4, 8) and group in (None, 32, 64, 128):  # what vLLM's kernels take
            told += [("vLLM", f"vllm serve {named}"), ("TGI", f"text-generation-launcher --model-id {named}")]
        return told
