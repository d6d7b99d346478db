"""Packing: text becomes shards of pieces (pipeline/data/shards.py), and an index fills sequences with these.

What a sequence is: pipeline/data/sequences.py. What lies on disk: pipeline/data/flat.py. Shards keep the order of the
text; only the index, a few bytes a piece, knows the sequences, so that no token is written twice.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.files import sync, write_json
from pipeline.data.flat import FORMAT, Array, Shard
from pipeline.data.parts import Parts, RowParts
from pipeline.data.prepared import SPELLINGS, STATISTICS, once
from pipeline.data.sequences import INDEX, SEQUENCES, Sequences
from pipeline.data.shards import Shards
from pipeline.data.source import DataSource

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def prepare(
    documents: Dataset | Callable[[], Dataset | Parts],
    tokenizer: PreTrainedTokenizerBase,
    data: DataSource,
    *,
    folder: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Sequences, dict[str, Any]]:
    """The sequences of `documents` (a column `text` or `messages`), memory mapped from `folder`; their statistics.
    Where they are made already, a function that gives the documents is not called.

    With data.weight_column the documents also have a column `weight`. A `teacher_tokenizer` aligns the sequences with
    the teacher's tokens (see pipeline/data/sequences.py); statistics then count `spans`, `spanned` (supervised tokens
    that lie in spans), `long_spans` (left out, see alignment.LONGEST) and `teacher_tokens`.

    Sequences stand in the order of their first piece. Shards that a killed run finished are kept.
    """

    def build(aside: Path) -> list[Shard]:
        given = documents() if callable(documents) else documents
        parts = given if isinstance(given, Parts) else RowParts(given)
        shards = Shards(parts, tokenizer, data, teacher_tokenizer)
        made = shards.make(aside)
        counted, also = shards.counted(made)
        index(aside, made, max_length=data.max_length, packing=data.packing, counted=counted, also=also)
        return made

    return once(folder, build)


def index(
    folder: Path,
    shards: list[Shard],
    *,
    max_length: int,
    packing: bool,
    counted: dict[str, Any],
    also: dict[str, Any] | None = None,
) -> None:
    """Fill sequences with the pieces of the shards; `counted` and `also` go into their statistics."""
    columns = shards[0].columns
    (folder / INDEX).mkdir()

    def write(name: str, kind: str, values: Array) -> None:
        path = folder / INDEX / f"{name}.bin"
        values.astype(kind, copy=False).tofile(path)
        sync(path)

    lengths = _count(shards, "input_ids")
    for name in [name for name in columns.counts if name in columns.kinds]:
        each = lengths if name == "input_ids" else _count(shards, name)
        write(f"{name}.begin", "<i8", np.concatenate([[0], np.cumsum(each, dtype=np.int64)]))
    total = _sums_of(lengths, max_length, packing, write)
    supervised = total(_count(shards, "supervised") if columns.learnt else lengths - 1)
    sizes, tokens = total(_count(shards, "bytes")), total(lengths)
    for name, values in (("tokens", tokens), ("supervised", supervised), ("bytes", sizes)):
        write(name, "<i4", values)
    told = {
        "format": FORMAT,
        "columns": asdict(columns),
        "shards": [shard.sizes for shard in shards],
        "sequences": len(tokens),
        "packed": packing,
    }
    write_json(folder / SEQUENCES, told)
    statistics = {
        SPELLINGS: 0,
        **counted,
        "pieces": len(lengths),
        "sequences": len(tokens),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised": int(supervised.sum(dtype=np.int64)),
        "bytes": int(sizes.sum(dtype=np.int64)),
        "packing_efficiency": int(lengths.sum(dtype=np.int64)) / max(1, len(tokens) * max_length),
    }
    if columns.weights:
        weight = Sequences(folder).sums_of_weights()
        write("weight", "<f8", weight)
        statistics["weight"] = float(weight.sum())
    write_json(folder / STATISTICS, statistics | (also or {}))
    sync(folder / INDEX)


def _count(shards: list[Shard], name: str) -> Array:
    return np.concatenate([shard.count(name) for shard in shards])


def _sums_of(
    lengths: Array, max_length: int, packing: bool, write: Callable[[str, str, Array], None]
) -> Callable[[Array], Array]:
    """Write which pieces make up which sequence. Returns what adds up a number of each piece over the sequences."""
    if not packing:
        return lambda values: values
    sequence_of = best_fit_decreasing(lengths, max_length)
    order = np.argsort(sequence_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(sequence_of))])
    write("pieces", "<u4" if len(lengths) < 2**32 else "<i8", order)
    write("starts", "<i8", starts)

    def total(values: Array) -> Array:
        return np.add.reduceat(values[order], starts[:-1], dtype=np.int64) if len(values) else values

    return total


def best_fit_decreasing(lengths: Array, capacity: int) -> Array:
    """The sequence of every piece: longest piece first, each into the fullest sequence that still takes it.

    Sequences are numbered by their first piece. Needs every length to be at most `capacity`. Pieces of one length are
    placed together: the fullest sequence that takes one goes on being it until it takes no more. So the time is that of
    sorting, and a few steps for every length that occurs.
    """
    sequence_of = np.zeros(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths.astype(np.int64), kind="stable")
    sorted_lengths = lengths[by_length]
    begins: Array = np.flatnonzero(np.diff(sorted_lengths, prepend=-1))
    opened = _Open()
    count = 0
    for pieces in np.split(by_length, begins[1:]) if len(lengths) else []:
        length = int(lengths[pieces[0]])
        while len(pieces):
            room = opened.least(length)
            each = (room or capacity) // length  # as many go into one sequence
            wanted = -(-len(pieces) // each)
            if room is None:
                room, sequences = capacity, np.arange(count, count + wanted)
                count += wanted
            else:
                sequences = opened.take(room, wanted)
            placed = min(len(pieces), each * len(sequences))
            sequence_of[pieces[:placed]] = np.repeat(sequences, each)[:placed]
            full, rest = divmod(placed, each)
            opened.put(room - each * length, sequences[:full])
            if rest:
                opened.put(room - rest * length, sequences[full:])
            pieces = pieces[placed:]
    first_piece = np.zeros(count, dtype=np.int64)
    first_piece[sequence_of[::-1]] = np.arange(len(lengths))[::-1]  # of several, the last that is assigned stays
    rank = np.zeros(count, dtype=np.int64)
    rank[np.argsort(first_piece)] = np.arange(count)
    return rank[sequence_of]


class _Open:
    """Sequences that still have room, by how much; of those with as much, the last that was put there goes first."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # ascending, each once
        self._with: dict[int, list[Array]] = {}

    def least(self, length: int) -> int | None:
        at = bisect_left(self._rooms, length)
        return self._rooms[at] if at < len(self._rooms) else None

    def take(self, room: int, wanted: int) -> Array:
        """At most as many as wanted."""
        stack, taken = self._with[room], []
        while stack and wanted:
            last = stack.pop()
            if len(last) > wanted:
                stack.append(last[:-wanted])
                last = last[-wanted:]
            taken.append(last[::-1])
            wanted -= len(last)
        if not stack:
            del self._with[room], self._rooms[bisect_left(self._rooms, room)]
        return np.concatenate(taken)

    def put(self, room: int, sequences: Array) -> None:
        if not room or not len(sequences):
            return
        if room not in self._with:
            insort(self._rooms, room)
        self._with.setdefault(room, []).append(sequences)
