"""torchao's integers of 2 to 8 bits, each held in a byte: smaller than floats on disk, and open to its kernels."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.errors import Problems
from models.formats.checkpoint import beside, dtype_of, in_dtype, shards, tensors
from models.formats.container import check_scales, left_out, quantized_of, scales_OG, scheme_of
from models.formats.format import Finished, Format, Plan, Runtime, Written
from models.formats.loaded import loaded
from models.load import DTYPES, empty_model, load_config, parameter_count
from models.quantization.scheme import QuantizedMatrix, WeightScheme

_NAME = "torchao"


@dataclass(frozen=True)
class TorchAO(Format):
    """IntxUnpackedToInt8Tensor, the one class of torchao 0.18 that takes integers and scales of others as they are,
    on any device, and that transformers saves and opens as safetensors."""

    needs: ClassVar[tuple[str, ...]] = ("torchao",)

    def check(self, plan: Plan) -> None:
        scheme = scheme_of(plan, _NAME)
        problems = Problems()
        with problems:
            check_scales(plan, scheme.weights, _NAME)
        if scheme.activations is not None:
            problems.add(
                f"format={_NAME}: it rounds activations by another rule than they were quantized by; use "
                f"format=[compressed_tensors]"
            )
        problems.tell()

    def write(self, finished: Finished, folder: Path) -> Written:
        from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict

        quantized = quantized_of(finished)
        weights, matrices, state = quantized.scheme.weights, quantized.matrices, {}
        for path in shards(finished.folder):
            for name, tensor in tensors(path):
                held = name in matrices
                state[name] = (
                    _tensor(matrices[name], weights, finished.dtype) if held else in_dtype(tensor, finished.dtype)
                )
        data, metadata = flatten_tensor_state_dict(state)
        data = {name: tensor.contiguous() for name, tensor in data.items()}
        save_file(data, folder / "model.safetensors", metadata={"format": "pt", **metadata})
        beside(finished.folder, folder, {"dtype": finished.dtype, "quantization_config": self._config(finished)})
        total = sum(tensor.numel() * tensor.element_size() for tensor in data.values())
        return Written(8 * total / parameter_count(empty_model(load_config(str(finished.folder)))))

    def _config(self, finished: Finished) -> dict[str, Any]:
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup
        from transformers import TorchAoConfig

        quantized = finished.quantized
        assert quantized is not None
        weights = quantized.scheme.weights
        config = TorchAoConfig(
            IntxWeightOnlyConfig(
                weight_dtype=getattr(torch, f"int{weights.bits}"),
                granularity=PerGroup(weights.group_size) if weights.granularity == "group" else PerAxis(0),
                mapping_type=MappingType.SYMMETRIC if weights.symmetric else MappingType.ASYMMETRIC,
            ),
            modules_to_not_convert=left_out(load_config(str(finished.folder)), quantized.matrices),
        )
        found: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
        return found

    def open(self, folder: Path, device: str) -> Runtime:
        def dense(held: Tensor) -> Tensor:
            return held.dequantize() if hasattr(held, "qdata") else held

        return loaded(folder, device, dense)

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        dtype = dtype_of(load_config(str(folder)))
        return [("transformers", f"transformers serve {shlex.quote(path)} --dtype {dtype}")]


def _tensor(quantized: QuantizedMatrix, scheme: WeightScheme, dtype: str) -> Any:
    """Its integers are always around zero: of an asymmetric scheme, both they and the zero points are moved down."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    moved = 0 if scheme.symmetric else 2 ** (scheme.bits - 1)
    scale = scales_OG(quantized, scheme.scale_dtype).to(DTYPES[dtype])
    zero = (quantized.zero_point - moved).to(torch.int8).expand(scale.shape).contiguous()
    return IntxUnpackedToInt8Tensor(
        qdata=(quantized.integers - moved).to(torch.int8),
        scale=scale,
        zero_point=zero,
        target_dtype=getattr(torch, f"int{scheme.bits}"),
        block_size=[1, quantized.integers.shape[1] // scale.shape[1]],
        dtype=DTYPES[dtype],
        activation_quantization=None,
    )
