"""What a stage says of its work, from configurations alone, so that memory and time can be forecast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.data.calibration import Calibration
from pipeline.training.recipe import Recipe
from pipeline.training.settings import _BYTES_OF_TEXT_A_TOKEN as BYTES_OF_TEXT_A_TOKEN

__all__ = ("BYTES_OF_TEXT_A_TOKEN", "Reads", "Trains", "Workload", "Writes")


@dataclass(frozen=True, kw_only=True)
class Trains:
    """A student is trained, maybe beside a teacher. Configs are Hugging Face's."""

    recipe: Recipe
    student: Any
    teacher: Any = None  # where one is asked, or gives the student its shape
    fresh: bool = True  # the student starts from random weights, or from a part of its teacher
    start: str | None = None  # folder of the student's quantized weights, planned or there
    made_here: bool = False  # the teacher is trained by this run, too
    text_bytes: int | None = None  # of the training text, where that is known


@dataclass(frozen=True, kw_only=True)
class Reads:
    """A model reads text once."""

    model: Any
    dtype: str
    rows: int  # sequences at once
    length: int  # tokens of each, at most
    tokens: int | None  # in all; None: not known before the text is read
    backward: bool = False  # gradients are taken, too
    in_layers: bool = False  # one layer at a time is in the device's memory
    sharded: bool = False  # over the ranks, as ZeRO-3 has it
    several: bool = True  # ranks share the text
    times: int = 1  # it reads all of it so often

    @classmethod
    def of(cls, model: Any, dtype: str, text: Calibration, **more: Any) -> Reads:
        """Of calibration text; `more`: further fields."""
        tokens = text.samples * text.length
        return cls(model=model, dtype=dtype, rows=text.batch_size, length=text.length, tokens=tokens, **more)


@dataclass(frozen=True, kw_only=True)
class Writes:
    """A model writes answers."""

    model: Any
    dtype: str
    rows: int  # answers at once
    prompt: int  # tokens of the longest prompt
    new: int  # tokens of an answer, at most
    answers: int | None  # in all; None: not known before the text is read
    sharded: bool = False


Workload = Trains | Reads | Writes
