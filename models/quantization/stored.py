"""The file beside a quantized model, quantized.safetensors: its integers and scales."""

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
from models.quantization.ggml import TYPES, Blocks
from models.quantization.scheme import SCALE_DTYPES, Activations, QuantizedMatrix, Scheme, WeightScheme


@dataclass(frozen=True)
class QuantizedWeights:
    """By the matrices' names (models.matrices.Matrix), as their parameters are called: model.layers.0.….weight."""

    scheme: Scheme
    matrices: Mapping[str, QuantizedMatrix]
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)  # Float32[], of static activations
    cache: str | None = None  # of models.quantization.cache: what keys and values are kept in

    def write(self, path: Path) -> None:
        """Integers in 8 bits, scales in the scheme's dtype. The same weights always give the same bytes."""
        weights = self.scheme.weights
        tensors = {}
        for name, quantized in self.matrices.items():
            integers = quantized.integers.to(torch.int8 if weights.symmetric else torch.uint8)
            tensors[f"{name}.integers"] = integers.cpu().contiguous()
            tensors[f"{name}.scale"] = quantized.scale.to(SCALE_DTYPES[weights.scale_dtype]).cpu().contiguous()
            if not weights.symmetric:
                tensors[f"{name}.zero_point"] = quantized.zero_point.to(torch.uint8).cpu().contiguous()
        for name, scale in self.input_scales.items():
            tensors[f"{name}.input_scale"] = scale.float().cpu().contiguous()
        metadata: dict[str, Any] = {"scheme": asdict(self.scheme)}
        if self.cache is not None:
            metadata["cache"] = self.cache
        # One string: safetensors writes several metadata keys in an order of its own.
        save_file(tensors, path, metadata={"quantization": json.dumps(metadata)})

    def bits(self, name: str) -> float:
        """What a matrix takes, in all: integers, scales and zero points."""
        shape = self.matrices[name].shape
        return self.scheme.weights.bits_per_weight(shape) * shape[0] * shape[1]


class _OnDisk(Mapping[str, QuantizedMatrix]):
    """Matrices in a file, each read when it is asked for: the integers of a whole model are four times its packed
    size."""

    def __init__(self, path: Path) -> None:
        self._file = safe_open(path, "pt")
        self._keys = frozenset(self._file.keys())

    def __getitem__(self, name: str) -> QuantizedMatrix:
        if f"{name}.integers" not in self._keys:
            raise KeyError(name)
        scale = self._file.get_tensor(f"{name}.scale").float()
        zero = f"{name}.zero_point"
        zero_point = self._file.get_tensor(zero).int() if zero in self._keys else torch.zeros_like(scale).int()
        return QuantizedMatrix(self._file.get_tensor(f"{name}.integers").int(), scale, zero_point)

    def __contains__(self, name: object) -> bool:
        return f"{name}.integers" in self._keys

    def __iter__(self) -> Iterator[str]:
        return (key.removesuffix(".integers") for key in sorted(self._keys) if key.endswith(".integers"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def input_scales(self) -> dict[str, Tensor]:
        found = [key for key in self._keys if key.endswith(".input_scale")]
        return {key.removesuffix(".input_scale"): self._file.get_tensor(key) for key in sorted(found)}


@dataclass(frozen=True)
class BlockWeights:
    """Matrices in blocks that ggml itself has made (models.quantization.ggml), by the same names."""

    matrices: Mapping[str, Blocks]
    cache: str | None = None

    def write(self, path: Path) -> None:
        """The same weights always give the same bytes."""
        tensors = {f"{name}.blocks": blocks.bytes.cpu().contiguous() for name, blocks in self.matrices.items()}
        metadata: dict[str, Any] = {"ggml": {name: blocks.type for name, blocks in sorted(self.matrices.items())}}
        if self.cache is not None:
            metadata["cache"] = self.cache
        save_file(tensors, path, metadata={"quantization": json.dumps(metadata)})

    def bits(self, name: str) -> float:
        """What a matrix takes, in all."""
        return self.matrices[name].bits()


def read_quantized(path: Path) -> QuantizedWeights:
    """Its matrices are read one at a time, when they are asked for. Raises Refusal where the file holds none."""
    matrices = _OnDisk(path)
    return QuantizedWeights(_scheme(path), matrices, matrices.input_scales(), _metadata(path).get("cache"))


def open_quantized(path: Path) -> QuantizedWeights | BlockWeights:
    """Of either kind. Raises Refusal where the file holds neither."""
    metadata = _metadata(path)
    if "ggml" not in metadata:
        return read_quantized(path)
    try:
        with safe_open(path, "pt") as file:
            made = {name: Blocks(kind, file.get_tensor(f"{name}.blocks")) for name, kind in metadata["ggml"].items()}
    except (SafetensorError, AttributeError) as problem:
        raise _unreadable(path, problem) from None
    if odd := [blocks.type for blocks in made.values() if blocks.type not in TYPES]:
        raise _unreadable(path, ValueError(f"ggml has no type {odd[0]}"))
    return BlockWeights(made, metadata.get("cache"))


def join(parts: Sequence[Path], path: Path) -> None:
    """One file of several, which hold other matrices each and are alike otherwise. Integers are mapped, not read."""
    tensors = {name: tensor for part in parts for name, tensor in load_file(part).items()}
    save_file(tensors, path, metadata={"quantization": json.dumps(_metadata(parts[0]))})


@dataclass(frozen=True)
class Outline:
    """What is known of quantized weights before their integers are read, or before there are any."""

    shapes: Mapping[str, tuple[int, int]]  # [O, I] of the matrices
    scheme: Scheme | None = None
    ggml: str | None = None  # of models.quantization.ggml.TYPES, in place of a scheme

    def as_json(self) -> dict[str, Any]:
        return {
            "matrices": {name: list(shape) for name, shape in self.shapes.items()},
            "scheme": None if self.scheme is None else asdict(self.scheme),
            "ggml": self.ggml,
        }

    @classmethod
    def from_json(cls, metadata: Mapping[str, Any]) -> Outline:
        shapes = {name: (outputs, inputs) for name, (outputs, inputs) in metadata["matrices"].items()}
        return cls(shapes, _built(metadata["scheme"]) if metadata["scheme"] else None, metadata["ggml"])


def read_outline(path: Path) -> Outline:
    """Of a file, without its integers. Raises Refusal where it holds no quantized weights."""
    metadata = _metadata(path)
    if "ggml" in metadata:
        blocks = open_quantized(path)
        shapes = {name: each.shape for name, each in blocks.matrices.items()}
        types = sorted(set(metadata["ggml"].values()))
        return Outline(shapes, ggml=types[0])
    found = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():
            if key.endswith(".integers"):
                outputs, inputs = file.get_slice(key).get_shape()
                found[key.removesuffix(".integers")] = (outputs, inputs)
    return Outline(found, _scheme(path))


def _scheme(path: Path) -> Scheme:
    try:
        return _built(_metadata(path)["scheme"])
    except (KeyError, TypeError) as problem:
        raise _unreadable(path, problem) from None


def _built(metadata: Mapping[str, Any]) -> Scheme:
    activations = metadata["activations"]
    return Scheme(WeightScheme(**metadata["weights"]), Activations(**activations) if activations else None)


def _metadata(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = json.loads(file.metadata()["quantization"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise _unreadable(path, problem) from None
    return metadata


def _unreadable(path: Path, problem: Exception) -> Refusal:
    return Refusal(f"{path} holds no quantized weights ({problem}); quantize the model again")
