"""What lies beside a quantized model, in grid.safetensors: the integers its weights are made of, and their grid."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import Refusal
from models.quantization.activations import Activations
from models.quantization.ggml import Blocks
from models.quantization.grid import SCALE_DTYPES, Grid, Quantized


@dataclass(frozen=True)
class Record:
    """By the matrices' names (models.layerwise.Matrix), as their parameters are called: model.layers.0.….weight."""

    grid: Grid
    matrices: Mapping[str, Quantized]
    activations: Activations | None = None  # of what these matrices read
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)  # Float32[], of static activations

    def write(self, path: Path) -> None:
        """Integers in 8 bits, scales in the grid's dtype. The same record always gives the same bytes."""
        tensors = {}
        for name, quantized in self.matrices.items():
            integers = quantized.integers.to(torch.int8 if self.grid.symmetric else torch.uint8)
            tensors[f"{name}.integers"] = integers.cpu().contiguous()
            tensors[f"{name}.scale"] = quantized.scale.to(SCALE_DTYPES[self.grid.scale_dtype]).cpu().contiguous()
            if not self.grid.symmetric:
                tensors[f"{name}.zero_point"] = quantized.zero_point.to(torch.uint8).cpu().contiguous()
        for name, scale in self.input_scales.items():
            tensors[f"{name}.input_scale"] = scale.float().cpu().contiguous()
        said = {"grid": asdict(self.grid)}
        if self.activations is not None:
            said["activations"] = asdict(self.activations)
        # One string: safetensors writes several metadata keys in an order of its own.
        save_file(tensors, path, metadata={"quantization": json.dumps(said)})


def read_record(path: Path) -> Record:
    """Raises Refusal where the file is not such a record."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["quantization"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        grid = Grid(**said["grid"])
        activations = Activations(**said["activations"]) if "activations" in said else None
        made = {}
        for name in [key.removesuffix(".integers") for key in tensors if key.endswith(".integers")]:
            scale = tensors[f"{name}.scale"].float()
            zero_point = tensors.get(f"{name}.zero_point", torch.zeros(scale.shape, dtype=torch.int32))
            made[name] = Quantized(tensors[f"{name}.integers"].int(), scale, zero_point.int())
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise Refusal(f"{path}: no record of a quantized model ({problem}); run the stage quantize again") from None
    inputs = {key.removesuffix(".input_scale"): t for key, t in tensors.items() if key.endswith(".input_scale")}
    return Record(grid, made, activations, inputs)


def read_grid(path: Path) -> tuple[Grid, Activations | None]:
    """Without the integers. Raises Refusal where the file is not such a record."""
    try:
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["quantization"])
        return Grid(**said["grid"]), Activations(**said["activations"]) if "activations" in said else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise Refusal(f"{path}: no record of a quantized model ({problem}); run the stage quantize again") from None


@dataclass(frozen=True)
class BlockRecord:
    """The other kind of record: matrices in blocks that ggml itself has made (models.quantization.ggml), by the same
    names."""

    matrices: Mapping[str, Blocks]

    def write(self, path: Path) -> None:
        """The same record always gives the same bytes."""
        tensors = {f"{name}.blocks": blocks.bytes.cpu().contiguous() for name, blocks in self.matrices.items()}
        types = {name: blocks.type for name, blocks in sorted(self.matrices.items())}
        save_file(tensors, path, metadata={"quantization": json.dumps({"ggml": types})})


def read_blocks(path: Path) -> BlockRecord:
    """Raises Refusal where the file is not such a record."""
    try:
        with safe_open(path, "pt") as file:
            types = json.loads(file.metadata()["quantization"])["ggml"]
            return BlockRecord({name: Blocks(types[name], file.get_tensor(f"{name}.blocks")) for name in types})
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise Refusal(f"{path}: no record of ggml's blocks ({problem}); run the stage quantize again") from None


def is_blocks(path: Path) -> bool:
    """Whether a record is of ggml's blocks. Raises Refusal where the file is no record at all."""
    try:
        with safe_open(path, "pt") as file:
            return "ggml" in json.loads(file.metadata()["quantization"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise Refusal(f"{path}: no record of a quantized model ({problem}); run the stage quantize again") from None
