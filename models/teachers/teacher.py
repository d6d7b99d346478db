"""Where a teacher's signal comes from: the contract of conf/teacher/*.yaml, and of what it opens.

A source is a handful of values; `open` makes the teacher of it that a training step asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from models.objectives.aligned import Aligned
from models.objectives.head import Head
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal
from models.objectives.term import Objective
from models.representations import Capture

Result = TypeVar("Result")


@runtime_checkable
class Source(Protocol):
    path: str  # folder or hub id of the teacher: its tokenizer, its config and, where it runs here, its weights
    dtype: str  # of models.load.DTYPES
    trust_remote_code: bool
    needs_record: ClassVar[bool]  # whether training reads what the stage `record` wrote
    runs_here: ClassVar[bool]  # whether the teacher's weights are opened by this program at all

    def check(self, objective: Objective) -> None:
        """Refuse, before anything is loaded, an objective this source cannot serve."""
        ...

    def open(self, opening: Opening) -> Teacher: ...


@dataclass(frozen=True)
class Opening:
    """What a source needs to know of the training that asks."""

    vocabulary: int  # tokens of the teacher's tokenizer
    attention: str | None = None
    packed: bool = True
    pairs: tuple[Int[Tensor, " C"], Int[Tensor, " C"]] | None = None  # (student's, teacher's) tokens of the same bytes


@dataclass
class Looked:
    """What the teacher has to say of a batch, before its head is at hand."""

    batch: dict[str, Any]
    hidden: Tensor | None = None
    capture: Capture | None = None


@runtime_checkable
class Teacher(Protocol):
    def check(self) -> None:
        """Refuse, on the device and before the first step, a model that would give another signal than its own."""
        ...

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        """The teacher's forward over the batch, where it has one; no graph."""
        ...

    def give(self, looked: Looked, work: Callable[[Signal], Result]) -> Result:
        """`work(signal)`, while the signal, the teacher's head included, is whole in memory."""
        ...

    def close(self) -> None:
        """Free what it holds; the stage is over."""
        ...


@torch.no_grad()
def look_through(model: Any, run: Callable[[Tensor, Tensor], Tensor], batch: dict[str, Any], wanted: Wanted) -> Looked:
    """The forward of a teacher that runs here, by `run(ids, positions)`; over its own tokens where it has some."""
    own = "teacher_" if "teacher_input_ids" in batch else ""
    ids, positions = batch[f"{own}input_ids"], batch[f"{own}position_ids"]
    with capturing(model, wanted.teacher_hidden, wanted.teacher_relations) as capture:
        hidden = run(ids, positions)
    if capture is not None:
        capture.reshape(*ids.shape)
    return Looked(batch, hidden, capture)


def capturing(model: Any, hidden: Sequence[int], relations: Sequence[int]) -> Any:
    """A context that gives a Capture, or None where nothing is wanted: not every family can be captured."""
    return Capture(model, hidden, relations) if hidden or relations else nullcontext()


def signal_of(looked: Looked, head: Head, opening: Opening) -> Signal:
    """Hidden states and head as the engine takes them."""
    assert looked.hidden is not None
    if opening.pairs is None:
        return Dense(looked.hidden, head)
    ids = looked.batch["teacher_input_ids"]
    student_ids_C, teacher_ids_C = (each.to(ids.device) for each in opening.pairs)
    return Aligned(
        looked.hidden,
        head,
        ids.roll(-1, 1),
        looked.batch["spans"],
        looked.batch["input_ids"].shape[1],
        student_ids_C,
        teacher_ids_C,
        opening.vocabulary,
    )
