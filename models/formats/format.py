"""What a format is: all that the stage export (pipeline/steps/exporter.py) and other stages know of it.

A format of your own is a frozen dataclass that derives from `Format`, in a file of its own here, and a yaml in
conf/format that names it as `_target_`, sets its fields and begins with `# @package formats.NAME`. Then `format=[NAME]`
writes it. Nothing else is edited.

What is called, in order:

1. The check (one process, no weights, before any stage starts): the packages in `needs` are looked up, then `check` is
   called; the stage prune asks for `multiple`. Whatever the container cannot hold is refused here, by raising
   `Refusal` with the value and the remedy.
2. The stage export: `write` fills an empty folder. The tokenizer's files that it leaves out are added.
3. The certificate, in a fresh process: `open` reads that folder. Of the `Runtime` every weight is compared with the
   model's to the bit (but for those that `Written` names), its logits with the model's, and its speed is measured.
4. `serving` gives the commands for the model card.

How a packed module's tensors are called, and how they are laid out, is known to the format's own file alone
(models.formats.unpacked takes their names as an argument).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from models.measure import Speed
from models.quantization.scheme import Activations, Scheme
from models.quantization.stored import BlockWeights, QuantizedWeights

# B sequences, T tokens, V vocabulary, O outputs of a matrix, I its inputs


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
    name: str = ""  # for containers that say one; "": the folder's
    texts: Sequence[str] = ()  # that a container's own tokenizer is tried on


@dataclass(frozen=True)
class Written:
    """What became of the model; the certificate is judged by it, and the card reports it."""

    bits_per_weight: float  # of all parameters, scales and padding counted
    # parameter or subject (activations, tokenizer) → what it became in place of what was asked
    fallbacks: Mapping[str, str] = field(default_factory=dict)
    rounded: bool = False  # whether the format itself quantized plain weights, as it was asked to
    activations: Activations | None = None  # how its runtime rounds activations; None: not at all
    otherwise: Collection[str] = ()  # plain parameters that are held in another way (fewer bits, moved): not compared


class Runtime(Protocol):
    """An export, opened by what will serve it."""

    name: ClassVar[str]  # transformers, llama.cpp
    serves: ClassVar[bool]  # False: another one serves the files, and the speed of this one is not measured

    @property
    def limit(self) -> int | None:
        """The most tokens of a sequence, where the model's config has such a limit."""
        ...

    def weight(self, name: str) -> Tensor:
        """Float32[O, I]: the matrix of that name in the plain checkpoint, dequantized; any other parameter in its own
        shape."""
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


class Format(ABC):
    """Writes a finished model in one container, and opens it again."""

    needs: ClassVar[tuple[str, ...]] = ()  # packages beyond the project's own, as pip names them: "gguf>=0.17"

    @property
    def multiple(self) -> int:
        """What the inputs and outputs of every matrix have to be a multiple of: the stage prune keeps such widths where
        its `multiple_of` is auto. 1: the container takes any width."""
        return 1

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Raises Refusal for what the container cannot hold, with what it could. No weight has been read, and the model
        may not exist yet."""

    @abstractmethod
    def write(self, finished: Finished, folder: Path) -> Written:
        """Fill the folder, which is empty. Integers and scales are packed as they are, never rounded anew; what is
        changed all the same is reported in `Written`. Nothing but the folder is written."""

    @abstractmethod
    def open(self, folder: Path, device: str) -> Runtime:
        """What `write` has written, opened by its runtime on "cpu" or "cuda". Called in a fresh process: nothing but
        the folder is read, so that the certificate is of the files."""

    @abstractmethod
    def serving(self, folder: Path, path: str) -> list[tuple[str, str]]:
        """(runtime, shell command) of those that load this export, for its model card; [] where none does. It lies in
        `folder`, and will be served from `path`."""
