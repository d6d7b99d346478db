"""Answers of a teacher on their way to disk: the columns, and shards that are whole or absent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Refusal
from models.files import written_aside
from models.generation import Answer
from pipeline.data.answer_files import ANSWERS, DROPPED

_FLUSH_SECONDS = 300.0
AT_ONCE = 1000  # prompts, or answers, in memory
_IDS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
PROMPTS_SCHEMA = pa.schema(
    {"split": pa.string(), "provenance": pa.string(), "prompt": pa.string(), "ids": _IDS, "teacher_ids": _IDS}
)
SHARD_SCHEMA = pa.schema(
    {
        "provenance": pa.string(),
        "sample": pa.int32(),
        "completion_ids": _IDS,
        "log_probabilities": _FLOATS,  # null where a server reports none; an end token that was added has none
        "finish_reason": pa.string(),
    }
)
ANSWERS_SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "completion": pa.string(),
        "prompt_ids": _IDS,
        "completion_ids": _IDS,
        "log_probabilities": _FLOATS,
        "finish_reason": pa.string(),
        "split": pa.string(),
        "sample": pa.int32(),
        "provenance": pa.string(),
        "teacher_prompt_ids": _IDS,
    }
)
DROPPED_SCHEMA = ANSWERS_SCHEMA.append(pa.field("dropped_by", pa.string()))


class Found:
    """(provenance, sample) → the answer, of all shards in a folder and of earlier results."""

    def __init__(self, folder: Path, also: Sequence[str] = ()) -> None:
        paths = [*sorted(folder.glob("shard-*.parquet")), *map(Path, also)]
        tables = [_read(path) for path in paths]
        self.table = pa.concat_tables([SHARD_SCHEMA.empty_table(), *tables]).combine_chunks()
        keys = zip(self.table["provenance"].to_pylist(), self.table["sample"].to_pylist(), strict=True)
        self.places: dict[tuple[str, int], int] = {}
        for place, key in enumerate(keys):
            self.places.setdefault(key, place)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.places

    def __getitem__(self, key: tuple[str, int]) -> dict[str, Any]:
        answer: dict[str, Any] = self.table.slice(self.places[key], 1).to_pylist()[0]
        return answer


def answers_in(folder: Path) -> list[Path]:
    """The files of all answers that a result of the stage holds, or its shelf while it is unfinished."""
    whole = [path for name in (ANSWERS, DROPPED) if (path := folder / name).exists()]
    return whole or sorted(folder.glob("shard-*.parquet"))


def _read(path: Path) -> pa.Table:
    """Raises Refusal where a page is not what was written."""
    try:
        return pq.read_table(path, columns=SHARD_SCHEMA.names, page_checksum_verification=True).cast(SHARD_SCHEMA)
    except (OSError, pa.ArrowException) as problem:
        told = str(problem).splitlines()[0]
        raise Refusal(f"{path} is damaged ({told}); restore it, or remove it to have its answers made again") from None


class Shards:
    """Answers on their way: gathered, and written as files that are whole or absent; `rank` keeps writers apart."""

    def __init__(self, folder: Path, rank: int, rows: int) -> None:
        self.folder, self.rank, self.rows_at_once = folder, rank, rows
        folder.mkdir(parents=True, exist_ok=True)
        mine = [int(path.stem.split("-")[2]) for path in folder.glob(f"shard-{rank:04d}-*.parquet")]
        self.number = max(mine, default=-1) + 1
        self.rows: list[dict[str, Any]] = []
        self.flushed = time.monotonic()

    def add(self, key: str, sample: int, answer: Answer, log_probabilities: list[float] | None) -> None:
        self.rows.append(
            {
                "provenance": key,
                "sample": sample,
                "completion_ids": answer.ids,
                "log_probabilities": log_probabilities,
                "finish_reason": answer.finish_reason,
            }
        )

    def flush_where_due(self) -> None:
        if len(self.rows) >= self.rows_at_once or time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            write_whole(self.folder / f"shard-{self.rank:04d}-{self.number:06d}.parquet", SHARD_SCHEMA, self.rows)
            self.number, self.rows = self.number + 1, []
        self.flushed = time.monotonic()


def in_parts(rows: Iterable[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    counted = groupby(enumerate(rows), key=lambda pair: pair[0] // size)
    return ([row for _, row in some] for _, some in counted)


def write_whole(path: Path, schema: pa.Schema, rows: Iterable[dict[str, Any]]) -> None:
    """Aside, synced, renamed: under its name a file is whole."""
    with written_aside(path) as aside, pq.ParquetWriter(aside, schema, write_page_checksum=True) as writer:
        for some in in_parts(rows, AT_ONCE):
            writer.write_table(pa.Table.from_pylist(some, schema))
