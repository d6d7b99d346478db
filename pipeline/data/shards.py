"""Text, part by part, into shards of tokens: in this process or in several, each shard whole or absent.

Neither the number of processes nor where one was killed changes a byte.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from models.files import remove
from pipeline.data.flat import SHARD, Columns, Shard, ShardWriter
from pipeline.data.parts import Parts
from pipeline.data.pieces import Found, Teacher, conversation_pieces, text_pieces
from pipeline.data.prepared import FIRST_SPELLING, SPELLINGS
from pipeline.data.source import DataSource
from pipeline.data.tokenizer import vocabulary_of
from pipeline.progress import shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARD_NAME = re.compile(r"\d{5,}")
_TEACHERS = ("spans", "spanned", "long_spans", "teacher_tokens")
_COUNTED = ("documents", "empty", "truncated", "cut_to_nothing", "unsupervised", *_TEACHERS)


def shard_folder(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}"


def clear(folder: Path) -> None:
    """Leave nothing in a folder but whole shards, which a run that was killed has finished."""
    for path in folder.iterdir():
        if not (_SHARD_NAME.fullmatch(path.name) and not path.is_symlink() and (path / SHARD).is_file()):
            remove(path)


@dataclass(frozen=True)
class Shards:
    """How the documents of a split become shards. All of it can go to another process."""

    parts: Parts
    tokenizer: PreTrainedTokenizerBase
    data: DataSource
    teacher_tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def columns(self) -> Columns:
        teachers = self.teacher_tokenizer
        return Columns(
            vocabulary_of(self.tokenizer),
            learnt=self.parts.chat,
            weights=self.data.weight_column is not None,
            teacher_vocabulary=0 if teachers is None else vocabulary_of(teachers),
            spans=teachers is not None,
        )

    def make(self, folder: Path, workers: int | None = None) -> list[Shard]:
        """All shards, in their order; those that are whole already are kept. `workers`: None as data.workers says."""
        clear(folder)
        missing = self.missing(folder)
        self.make_some(folder, missing, self.data.workers if workers is None else workers)
        return [Shard.read(shard_folder(folder, number)) for number in range(len(self.parts))]

    def missing(self, folder: Path) -> list[int]:
        return [n for n in range(len(self.parts)) if not (shard_folder(folder, n) / SHARD).exists()]

    def make_some(self, folder: Path, numbers: list[int], workers: int | None) -> None:
        """`workers`: processes; None: one a core."""
        workers = min(workers or len(os.sched_getaffinity(0)), len(numbers)) if self.parts.spread else 1
        if workers <= 1:
            for number in shown(numbers, len(numbers), "tokenizing", len(numbers) > 1):
                self.make_one(folder, number)
            return
        for _ in shown(self._in_processes(folder, numbers, workers), len(numbers), "tokenizing"):
            pass

    def _in_processes(self, folder: Path, numbers: list[int], workers: int) -> Iterator[int]:
        with (
            _one_thread_each(),
            ProcessPoolExecutor(workers, _clean_processes(), initializer=_begin, initargs=(self, folder)) as pool,
        ):
            work = {pool.submit(_make, number): number for number in numbers}
            try:
                for done in as_completed(work):
                    done.result()
                    yield work[done]
            except BrokenProcessPool:
                raise Refusal(
                    f"{self.data.node}.workers={workers}: a process that tokenizes was killed, perhaps for want of "
                    f"memory; run it again, which keeps the shards that are finished, with fewer workers"
                ) from None
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def make_one(self, folder: Path, number: int) -> None:
        tally = Found()
        maker = conversation_pieces if self.parts.chat else text_pieces
        teacher = None
        if self.teacher_tokenizer is not None:
            teacher = Teacher(self.teacher_tokenizer, self.tokenizer, tally)
        make = maker(self.tokenizer, self.data, tally, teacher)
        writer = ShardWriter(shard_folder(folder, number), self.columns)
        try:
            for batch in self.parts.batches(number, tally):
                writer.add(make(batch))
            writer.close({**tally, "spellings": [controls.statistics() for controls in tally.controls]})
        except BaseException:
            writer.drop()
            raise

    def counted(self, shards: Iterable[Shard]) -> tuple[dict[str, Any], dict[str, Any]]:
        """For the statistics, of all shards: what was counted of the text, and of a teacher's tokens."""
        found: Counter[str] = Counter()
        spellings: list[dict[str, Any]] = []
        for shard in shards:
            found.update({name: count for name, count in shard.counted.items() if name != "spellings"})
            told = shard.counted["spellings"]
            spellings = (
                [
                    {
                        SPELLINGS: one[SPELLINGS] + other[SPELLINGS],
                        FIRST_SPELLING: one[FIRST_SPELLING] or other[FIRST_SPELLING],
                    }
                    for one, other in zip(spellings, told, strict=True)
                ]
                if spellings
                else told
            )
        self.parts.check(found)
        names = ("documents", "empty", "truncated", "cut_to_nothing", "unsupervised")
        counted = {name: found[name] for name in names}
        most = max(spellings, key=lambda one: int(one[SPELLINGS]))  # of the tokenizer that found most
        also = {name: found[name] for name in _TEACHERS} if self.teacher_tokenizer is not None else {}
        return counted | most, also


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are started inside use one thread each: a tokenizer's own would only compete."""
    names = ("TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", "OMP_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict(zip(names, ("false", "1", "1"), strict=True))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


_work: Callable[[int], None]  # of a process of the pool


def _clean_processes() -> BaseContext:
    """Forks of a process that has done nothing but import: this one has threads, and importing takes longer than
    tokenizing a part where a hundred do it at once."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers.tokenization_utils_base", "pyarrow", __name__])
    return context


def _begin(shards: Shards, folder: Path) -> None:
    global _work
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def work(number: int) -> None:
        shards.make_one(folder, number)

    _work = work


def _end_with_parent() -> None:
    """Nobody must write on, unseen, when whoever asked for it was killed."""
    asked_by = parent_process()
    assert asked_by is not None
    asked_by.join()
    os._exit(1)


def _make(number: int) -> None:
    _work(number)
