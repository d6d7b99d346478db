"""What lies beside a quantized model, in grid.safetensors: the integers its weights are made of, and their grid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import Refusal
from models.quantization.activations import Activations
from models.quantization.ggml import TYPES, Blocks
from models.quantization.grid import SCALE_DTYPES, Grid, Quantized


@dataclass(frozen=True)
class Record:
    """By the matrices' names (models.matrices.Matrix), as their parameters are called: model.layers.0.….weight."""

    grid: Grid
    matrices: Mapping[str, Quantized]
    activations: Activations | None = None  # of what these matrices read
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)  # Float32[], of static activations
    cache: str | None = None  # of models.quantization.cache: what keys and values are kept in

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
        said: dict[str, Any] = {"grid": asdict(self.grid)}
        if self.activations is not None:
            said["activations"] = asdict(self.activations)
        if self.cache is not None:
            said["cache"] = self.cache
        # One string: safetensors writes several metadata keys in an order of its own.
        save_file(tensors, path, metadata={"quantization": json.dumps(said)})

    def bits(self, name: str) -> float:
        """What a matrix takes, in all: integers, scales and zero points."""
        shape = self.matrices[name].shape
        return self.grid.bits_per_weight(shape) * shape[0] * shape[1]


class _OnDisk(Mapping[str, Quantized]):
    """The matrices of a record, each read when it is asked for: the integers of a whole model are four times its
    packed size."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._keys = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> Quantized:
        if f"{name}.integers" not in self._keys:
            raise KeyError(name)
        scale = self._file.get_tensor(f"{name}.scale").float()
        zero = f"{name}.zero_point"
        zero_point = self._file.get_tensor(zero).int() if zero in self._keys else torch.zeros_like(scale).int()
        return Quantized(self._file.get_tensor(f"{name}.integers").int(), scale, zero_point)

    def __contains__(self, name: object) -> bool:
        return f"{name}.integers" in self._keys

    def __iter__(self) -> Iterator[str]:
        return (key.removesuffix(".integers") for key in sorted(self._keys) if key.endswith(".integers"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def input_scales(self) -> dict[str, Tensor]:
        found = [key for key in self._keys if key.endswith(".input_scale")]
        return {key.removesuffix(".input_scale"): self._file.get_tensor(key) for key in sorted(found)}


def read_record(path: Path) -> Record:
    """Its matrices are read one at a time, when they are asked for. Raises Refusal where the file is no record."""
    grid, activations = read_grid(path)
    matrices = _OnDisk(path)
    return Record(grid, matrices, activations, matrices.input_scales(), _said(path).get("cache"))


def join(parts: Sequence[Path], path: Path) -> None:
    """One record of several, of other matrices each, that say the same otherwise. Integers are mapped, not read."""
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    save_file(tensors, path, metadata={"quantization": json.dumps(_said(parts[0]))})


@dataclass(frozen=True)
class Known:
    """What there is to know of a record before its integers are read, or before there are any."""

    shapes: Mapping[str, tuple[int, int]]  # [O, I] of its matrices
    grid: Grid | None = None
    activations: Activations | None = None
    ggml: str | None = None  # of models.quantization.ggml.TYPES, in place of a grid

    def said(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "matrices": {name: list(shape) for name, shape in self.shapes.items()},
            "grid": None if self.grid is None else asdict(self.grid),
            "activations": None if self.activations is None else asdict(self.activations),
            "ggml": self.ggml,
        }


def known(said: Mapping[str, Any]) -> Known:
    """Of what `Known.said` said."""
    return Known(
        {name: (outputs, inputs) for name, (outputs, inputs) in said["matrices"].items()},
        Grid(**said["grid"]) if said["grid"] else None,
        Activations(**said["activations"]) if said["activations"] else None,
        said["ggml"],
    )


def read_known(path: Path) -> Known:
    """Of a record, without its integers. Raises Refusal where the file is none."""
    said = _said(path)
    if "ggml" in said:
        blocks = open_record(path)
        shapes = {name: each.shape for name, each in blocks.matrices.items()}
        types = sorted(set(said["ggml"].values()))
        return Known(shapes, ggml=types[0])
    grid, activations = read_grid(path)
    found = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            if key.endswith(".integers"):
                outputs, inputs = file.get_slice(key).get_shape()
                found[key.removesuffix(".integers")] = (outputs, inputs)
    return Known(found, grid, activations)


def read_grid(path: Path) -> tuple[Grid, Activations | None]:
    """Without the integers. Raises Refusal where the file is no record."""
    said = _said(path)
    try:
        return Grid(**said["grid"]), Activations(**said["activations"]) if "activations" in said else None
    except (KeyError, TypeError) as problem:
        raise _no_record(path, problem) from None


def _said(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            said: dict[str, Any] = json.loads(file.metadata()["quantization"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise _no_record(path, problem) from None
    return said


def _no_record(path: Path, problem: Exception) -> Refusal:
    return Refusal(f"{path}: no record of a quantized model ({problem}); run the stage quantize again")


@dataclass(frozen=True)
class BlockRecord:
    """The other kind of record: matrices in blocks that ggml itself has made (models.quantization.ggml), by the same
    names."""

    matrices: Mapping[str, Blocks]
    cache: str | None = None

    def write(self, path: Path) -> None:
        """The same record always gives the same bytes."""
        tensors = {f"{name}.blocks": blocks.bytes.cpu().contiguous() for name, blocks in self.matrices.items()}
        said: dict[str, Any] = {"ggml": {name: blocks.type for name, blocks in sorted(self.matrices.items())}}
        if self.cache is not None:
            said["cache"] = self.cache
        save_file(tensors, path, metadata={"quantization": json.dumps(said)})

    def bits(self, name: str) -> float:
        """What a matrix takes, in all."""
        return self.matrices[name].bits()


def open_record(path: Path) -> Record | BlockRecord:
    """Of either kind. Raises Refusal where the file is no record."""
    said = _said(path)
    if "ggml" not in said:
        return read_record(path)
    try:
        with safe_open(path, "pt") as file:
            made = {name: Blocks(kind, file.get_tensor(f"{name}.blocks")) for name, kind in said["ggml"].items()}
    except (SafetensorError, AttributeError) as problem:
        raise _no_record(path, problem) from None
    if odd := [blocks.type for blocks in made.values() if blocks.type not in TYPES]:
        raise _no_record(path, ValueError(f"ggml has no type {odd[0]}"))
    return BlockRecord(made, said.get("cache"))
