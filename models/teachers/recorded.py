"""A teacher whose signal is on disk: its weights are never opened."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.load import DTYPES
from models.objectives.representation import Wanted
from models.objectives.signal import Signal
from models.teachers.cache import Cache
from models.teachers.encodings.encoding import Payload
from models.teachers.pieces import pieces_of
from models.teachers.teacher import Looked, Opening, Result, teacher_side


@dataclass
class _Reading(Looked):
    payload: Future[Payload] | None = None


class Recorded:
    """Looks up the pieces of each batch in a cache, while the student's forward runs."""

    def __init__(self, folder: str, opening: Opening) -> None:
        self.cache, self.opening = Cache(Path(folder)), opening
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="recorded")

    def check(self) -> None:
        """The front door has held the cache's header against teacher, tokenizer and objective."""

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        keys = [piece.key for piece in pieces_of(teacher_side(batch), self.cache.fingerprint)]
        return _Reading(batch, payload=self.reader.submit(self.cache.read, keys, batch["input_ids"].device))

    def give(self, looked: Looked, work: Callable[[Signal], Result]) -> Result:
        assert isinstance(looked, _Reading)
        assert looked.payload is not None
        # In the teacher's own dtype, whatever the student's precision, as the teacher itself would multiply.
        head = self.cache.open_head(looked.batch["input_ids"].device, DTYPES[self.cache.header.dtype])
        return work(self.cache.encoding.signal(looked.payload.result(), head))

    def close(self) -> None:
        self.reader.shutdown()
        self.cache.close()
