"""A teacher that runs here once, in the stage `record`, and not while students train."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import Refusal
from models.load import DTYPES
from models.objectives.term import Objective
from models.teachers.recorded import Recorded
from models.teachers.teacher import Opening, Source, Teacher


@dataclass(frozen=True)
class Cached(Source):
    """`cache` holds the signal of the teacher at `path`. Where only the cache is left, it is its own `path`: the
    tokenizer and the config lie in it."""

    path: str
    cache: str
    dtype: str = "float32"  # the recording teacher's
    trust_remote_code: bool = False
    recorder: Source | None = None  # how it runs where it is asked; None: it is recorded already

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"teacher.dtype={self.dtype}: need one of {', '.join(DTYPES)}")

    @property
    def recorded(self) -> str:
        return self.cache

    def asked_once(self) -> Source:
        if self.recorder is None:
            raise Refusal("teacher.recorder=null: it says how the teacher runs; use teacher@teacher.recorder=online")
        return self.recorder

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
