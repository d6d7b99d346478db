"""A teacher that runs here once, in the stage `record`, and not while students train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from models.errors import Refusal
from models.load import DTYPES
from models.objectives.term import Objective
from models.teachers.recorded import Recorded
from models.teachers.teacher import Opening, Source, Teacher


@dataclass(frozen=True)
class Cached:
    """`cache` holds the signal of the teacher at `path`. Where only the cache is left, it is its own `path`: the
    tokenizer and the config lie in it."""

    path: str
    cache: str
    dtype: str = "float32"  # the recording teacher's
    trust_remote_code: bool = False
    needs_record: ClassVar[bool] = True
    runs_here: ClassVar[bool] = True
    recorder: Source | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"teacher.dtype={self.dtype}: need one of {', '.join(DTYPES)}")

    def check(self, objective: Objective) -> None:
        refuse_representations(objective)

    def open(self, opening: Opening) -> Teacher:
        return Recorded(self.cache, opening)


def refuse_representations(objective: Objective) -> None:
    if objective.representations:
        raise Refusal(
            f"objective.also: {objective.representations[0].name} compares layers, and the teacher is on disk as a "
            f"cache of its signal only; use teacher=online or teacher=sharded"
        )
