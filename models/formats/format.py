"""What a model is exported as: the contract of conf/format/*.yaml, and of what serves the result."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from models.measure import Speed
from models.quantization.scheme import Activations, Scheme
from models.quantization.stored import BlockWeights, QuantizedWeights

# B sequences, T tokens, V vocabulary, O what a matrix gives, I what it reads


@dataclass(frozen=True)
class Plan:
    """What is known of a model before its weights are read."""

    config: Any  # transformers'
    shapes: Mapping[str, tuple[int, int]]  # [O, I] of the matrices that are quantized, or could be
    scheme: Scheme | None  # None: the model is not quantized, or to ggml's blocks
    blocks: str | None = None  # of models.quantization.ggml.TYPES: the model is quantized to these


@dataclass(frozen=True)
class Finished:
    """A model to be written: plain weights, and the integers that they are made of where they are quantized."""

    folder: Path  # an ordinary checkpoint with its tokenizer
    quantized: QuantizedWeights | None
    dtype: str  # of what is not quantized
    blocks: BlockWeights | None = None  # in place of `quantized`


@dataclass(frozen=True)
class Written:
    bits_per_weight: float  # of all parameters, scales and padding counted
    fallbacks: Mapping[str, str] = field(default_factory=dict)  # parameter → what it is held in, not being as asked
    rounded: bool = False  # whether the format itself quantized plain weights, as was asked
    activations: Activations | None = None  # how its runtime rounds activations; None: not at all
    otherwise: Collection[str] = ()  # parameters that are not quantized, and held in another way: fewer bits, moved


class Runtime(Protocol):
    """An export, opened by what will serve it."""

    name: ClassVar[str]  # transformers, llama.cpp
    serves: ClassVar[bool]  # False: it only reads what another one serves, and its speed is none of the format's

    @property
    def limit(self) -> int | None:
        """Tokens that it reads at most, where the model says so."""
        ...

    def weight(self, name: str) -> Tensor:
        """Float32[O, I]: the matrix of that name in the plain checkpoint, as it is multiplied with; any other parameter
        as it is."""
        ...

    def logits(self, input_ids: Tensor) -> Tensor:
        """Float32[B, T, V], of Int64[B, T] without padding."""
        ...

    def speed(self, prompt: Tensor, settings: Speed) -> dict[str, float]:
        """As models.measure.speed; `prompt`: Int64[1, T]."""
        ...

    def close(self) -> None:
        """Its memory is free again; nothing is asked of it afterwards."""
        ...


@runtime_checkable
class Format(Protocol):
    needs: ClassVar[tuple[str, ...]]  # packages, as pip names them

    def check(self, plan: Plan) -> None:
        """Raises Refusal for what the container cannot hold, with what it could."""
        ...

    def write(self, finished: Finished, folder: Path) -> Written:
        """Fill the folder. Integers and scales are packed as they are, never rounded anew."""
        ...

    def open(self, folder: Path, device: str) -> Runtime:
        """Of what `write` has written; nothing but the folder is read."""
        ...

    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        """(runtime, shell command) of those that load this export, for its model card. It lies in `folder`, and will be
        served from `path`."""
        ...
