"""Where a teacher's signal comes from: the contract of conf/teacher/*.yaml, and of what it opens.

A source is a frozen dataclass that derives from `Source`; `open` makes the teacher of it that a training step asks.
"""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from models.objectives.aligned import Aligned
from models.objectives.contexts import Contexts, in_students_order
from models.objectives.head import Head
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal
from models.objectives.term import Objective
from models.representations import Capture

if TYPE_CHECKING:
    from models.generation import Answer, Sampling
    from models.teachers.endpoint import Endpoint

SERVED = "served "  # begins the key of a teacher of which its name is all that is known

Result = TypeVar("Result")


class Source(ABC):
    path: str  # folder or hub id of the teacher: its tokenizer, its config and, where it runs here, its weights
    dtype: str  # of models.load.DTYPES
    trust_remote_code: bool

    @property
    def recorded(self) -> str | None:
        """The folder with its signal, as the stage `record` writes it, where training asks that and not the teacher."""
        return None

    @property
    def server(self) -> Endpoint | None:
        """Who answers where another program runs it. None: its weights are opened by this one."""
        return None

    @property
    def packed_weights(self) -> str | None:
        """In which kind of fewer bits its matrices are held, which ZeRO-3 cannot shard; None: as they are."""
        return None

    @property
    def needs_record(self) -> bool:
        return self.recorded is not None

    @property
    def runs_here(self) -> bool:
        return self.server is None

    def asked_once(self) -> Source:
        """What opens its weights for a stage that asks it before training (`record`, `generate`)."""
        return self

    def key(self, content_hash: str) -> str:
        """By what its signal and its answers are found again; `content_hash`: of the files at `path`."""
        return content_hash

    @abstractmethod
    def check(self, objective: Objective) -> None:
        """Refuse, before anything is loaded, an objective this source cannot serve."""

    @abstractmethod
    def open(self, opening: Opening) -> Teacher:
        """What a training step asks; weights may be loaded now or in its `check`."""


@dataclass(frozen=True)
class Opening:
    """What a source needs to know of the training that asks."""

    vocabulary: int  # tokens of the teacher's tokenizer
    attention: str | None = None
    packed: bool = True
    pairs: tuple[Int[Tensor, " C"], Int[Tensor, " C"]] | None = None  # (student's, teacher's) tokens of the same bytes
    prefix: Sequence[int] = ()  # what the teacher's side of every sequence begins with
    device: str = "cpu"  # or "cuda": this process's own one


@dataclass
class Looked:
    """What the teacher's forward gives for a batch, before its head is at hand."""

    batch: dict[str, Any]
    hidden: Tensor | None = None  # of all its tokens; of prompts of its own [D, N, H], of the supervised tokens alone
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


@runtime_checkable
class Author(Teacher, Protocol):
    """A teacher that also writes answers, for the stage `generate`."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **words: Any
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As models.generation.generate; on several ranks every one calls it with equally many prompts."""
        ...

    def log_probabilities(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **words: Any
    ) -> list[list[float]]:
        """As models.generation.log_probabilities, likewise."""
        ...


Run = Callable[[Tensor, Tensor, Any], Tensor]  # (ids, positions, cache or None) → hidden states


@torch.no_grad()
def look_through(model: Any, run: Run, batch: dict[str, Any], wanted: Wanted, prefix: Prefix | None = None) -> Looked:
    """The forward of a teacher that runs here; over its own tokens where it has some."""
    own = "teacher_" if "teacher_input_ids" in batch else ""
    ids, positions, targets = batch[f"{own}input_ids"], batch[f"{own}position_ids"], batch.get("teacher_targets")
    with capturing(model, wanted.teacher_hidden, wanted.teacher_relations) as capture:
        if prefix is not None and targets is not None:
            hidden, targets = prefix.go_on(run, ids, positions), targets[:, len(prefix) :]
        else:
            hidden = run(ids, positions, None)
    if capture is not None:
        capture.reshape(*ids.shape)
    if targets is not None:
        hidden = in_students_order(hidden, targets, batch["targets"])
    return Looked(batch, hidden, capture)


class Prefix:
    """The keys and values of tokens that all sequences begin with, made once for all batches."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self.cache: Any = None

    def __len__(self) -> int:
        return len(self.tokens)

    @torch.no_grad()
    def make(self, run: Run, config: Any, device: torch.device) -> bool:
        """Whether going on from a cache is, in this family, the whole forward.

        Shown on the tokens themselves, in two rows that share their first half, the second shorter and padded.
        """
        count = len(self)
        half, end = count // 2, count - count // 4
        ids = torch.tensor([self.tokens, self.tokens], device=device)
        positions = torch.arange(count, device=device).repeat(2, 1)
        ids[1, end:], positions[1, end:] = 0, torch.arange(count - end, device=device)  # as a batch is padded
        whole = run(ids, positions, None)[:, half:]
        try:
            self._read(run, config, ids[:1, :half], positions[:1, :half])
            rest = self.go_on(run, ids, positions, half)
            self._read(run, config, ids[:1], positions[:1])
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            return False
        real = torch.ones(rest.shape[:2], dtype=torch.bool, device=device)
        real[1, end - half :] = False
        rough = whole.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
        apart, size = (rest.float() - whole.float())[real].abs().max(), whole.float().abs().max()
        return bool(apart <= (0.02 if rough else 1e-4) * size + 1e-5)

    def _read(self, run: Run, config: Any, ids: Tensor, positions: Tensor) -> None:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=config)
        run(ids, positions, self.cache)

    def go_on(self, run: Run, ids: Tensor, positions: Tensor, length: int | None = None) -> Tensor:
        """Hidden states of what follows the prefix in every row; `length`: of so many of its tokens."""
        length = len(self) if length is None else length
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(ids))
        return run(ids[:, length:], positions[:, length:], cache)


def prefix_of(opening: Opening, run: Run, model: Any) -> Prefix | None:
    if not opening.prefix or _length_decides(model.config.get_text_config()):
        return None
    prefix = Prefix(opening.prefix)
    if prefix.make(run, model.config, next(model.parameters()).device):
        return prefix
    logging.getLogger(__name__).warning(
        "%s: its cache does not give the whole forward's states; the shared prompt is run with every sequence",
        type(model).__name__,
    )
    return None


def _length_decides(config: Any) -> bool:
    """Whether a text's first positions are turned otherwise when it goes on: what a short prefix proves is then not
    true of a long sequence."""
    rotary = getattr(config, "rope_parameters", None) or {}
    each = [rotary, *(value for value in rotary.values() if isinstance(value, dict))]  # some differ by kind of layer
    return any(one.get("rope_type") in ("dynamic", "longrope") for one in each)


def teacher_side(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as the teacher reads it: where its prompts are its own, their tokens under the usual names."""
    if "teacher_targets" not in batch:
        return batch
    return {name: batch[f"teacher_{name}"] for name in ("input_ids", "position_ids", "targets")}


def capturing(model: Any, hidden: Sequence[int], relations: Sequence[int]) -> Any:
    """A context that gives a Capture, or None where nothing is wanted: not every family can be captured."""
    return Capture(model, hidden, relations) if hidden or relations else nullcontext()


def signal_of(looked: Looked, head: Head, opening: Opening) -> Signal:
    """Hidden states and head as the engine takes them."""
    assert looked.hidden is not None
    if "teacher_targets" in looked.batch:
        return Contexts(looked.hidden, head)
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
