"""Packed sequences, read from flat token files (pipeline/data/flat.py): memory mapped, and never whole in memory.

A sequence is filled with pieces of documents. Read, it is

    input_ids
    position_ids   from 0 again with every piece
    targets        the next token of the same piece, or -100 where there is none or it is not supervised
    supervised     how many targets are not -100
    bytes          of the text, in UTF-8, that the supervised targets stand for

With `data.weight_column` a sequence also has

    weights        float32, beside the targets: what each counts in the loss, 0 where there is none
    weight         their sum, float64

and with a teacher of another tokenizer, or with prompts of its own,

    teacher_input_ids      what the teacher reads of the sequence's pieces
    teacher_position_ids   from 0 again with every piece, or with every prompt
    spans                  four numbers for each: the place in input_ids whose target is the span's first token,
                           the student's tokens, the place in teacher_input_ids that predicts the teacher's first
                           token of the span, the teacher's tokens. Both sides' tokens are the same bytes of text.
    teacher_targets        of prompts of its own: the answer's tokens, where they are predicted, -100 elsewhere

The index, beside the shards:

    index/NAME.begin.bin   int64: where each piece begins in the files NAME of all shards, and the last ends
    index/starts.bin       int64: where each sequence begins in `pieces`, and the last ends
    index/pieces.bin       the pieces of one sequence after another; without both files every piece is a sequence
    index/tokens.bin, supervised.bin, bytes.bin, weight.bin    of each sequence
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.flat import FORMAT, Array, Columns, columns_from

SEQUENCES, INDEX = "sequences.json", "index"


class Sequences:
    """The sequences in a folder. Indexed, it is read as a person would: dictionaries of lists."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._numbers: Array | None = None  # of a selection
        self._teachers = False  # only the teacher's side is read
        self._maps: dict[tuple[str, int | str], Array] = {}
        try:
            told = json.loads((self.folder / SEQUENCES).read_text())
        except (OSError, ValueError):
            told = {}
        if told.get("format") != FORMAT:
            raise Refusal(f"{folder}: no packed sequences of this version; run the stage again, which prepares them")
        self.columns: Columns = columns_from(told["columns"])
        self._kinds = self.columns.kinds
        sizes = {name: [shard[name] for shard in told["shards"]] for name in ("pieces", *self._kinds)}
        # Of each file, how much of it lies before every shard.
        self._before = {name: np.concatenate([[0], np.cumsum(each)]) for name, each in sizes.items()}
        self._count: int = told["sequences"]
        self._packed: bool = told["packed"]

    def __len__(self) -> int:
        return self._count if self._numbers is None else len(self._numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (self.folder, self._numbers, self._teachers)

    @property
    def column_names(self) -> list[str]:
        if self._teachers:
            return ["input_ids", "position_ids", "targets"]
        also = self.columns
        return [
            *("input_ids", "position_ids", "targets"),
            *(["weights"] if also.weights else []),
            *(["teacher_input_ids", "teacher_position_ids"] if also.teacher_vocabulary else []),
            *(["teacher_targets"] if also.prompted else []),
            *(["spans"] if also.spans else []),
            *("supervised", "bytes"),
            *(["weight"] if also.weights else []),
        ]

    # Numbers of every sequence

    @property
    def lengths(self) -> Array:
        """Tokens of each."""
        return self._of_each("tokens")

    @property
    def counts(self) -> Array:
        """What each counts in the loss: supervised tokens, or the sum of their weights."""
        return self._of_each("weight" if self.columns.weights else "supervised")

    def _of_each(self, name: str) -> Array:
        kind = np.dtype("<f8" if name == "weight" else "<i4")
        values = self._index(name, kind)
        return values if self._numbers is None else values[self._numbers]

    def sums_of_weights(self) -> Array:
        """What is written down as the weight of each."""
        weights = (self._weights(*self._pieces(number)) for number in range(len(self)))
        return np.array([np.add.reduceat(each.astype(np.float64), [0])[0] for each in weights], dtype=np.float64)

    # Views

    def select(self, numbers: Sequence[int] | Array) -> Sequences:
        """Only these."""
        chosen = np.asarray(numbers, dtype=np.int64)
        view = copy.copy(self)
        view._numbers = chosen if self._numbers is None else self._numbers[chosen]
        return view

    def teacher_side(self) -> Sequences:
        """As the teacher reads them: where its prompts are its own, their columns under the usual names."""
        view = copy.copy(self)
        view._teachers = self.columns.prompted
        return view

    # One, and several

    def arrays(self, number: int) -> dict[str, Any]:
        """A sequence as arrays: tokens as the file has them, positions and targets int64."""
        if self._numbers is not None:
            number = int(self._numbers[number])
        pieces, shards = self._pieces(number)
        if self._teachers:
            return self._side("teacher_input_ids", pieces, shards)[0]
        found, begins = self._side("input_ids", pieces, shards)
        if self.columns.weights:
            found["weights"] = self._weights(pieces, shards)
        if self.columns.teacher_vocabulary:
            side, teachers_begins = self._side("teacher_input_ids", pieces, shards)
            found |= {f"teacher_{name}": values for name, values in side.items()}
        if self.columns.spans:
            first, last = self._extents("spans", pieces)
            spans = self._read("spans", shards, first, last).reshape(-1, 4).copy()
            spans[:, 0] += np.repeat(begins, (last - first) // 4)
            spans[:, 2] += np.repeat(teachers_begins, (last - first) // 4)
            found["spans"] = spans.ravel()
        for name in ("supervised", "bytes", *(["weight"] if self.columns.weights else [])):
            found[name] = self._index(name, np.dtype("<f8" if name == "weight" else "<i4"))[number]
        return found

    def documents(self, begin: int) -> Array:
        """The document of every piece, from 0. A text goes on in the piece after, where that does not begin with the
        token `begin`; conversations, answers and queries are a piece each."""
        begins = self._index("input_ids.begin", np.dtype("<i8"))[:-1]
        if self.columns.learnt or not len(begins):
            return np.arange(len(begins))
        shards = np.searchsorted(self._before["pieces"], np.arange(len(begins)), side="right") - 1
        first = np.empty(len(begins), dtype=np.int64)
        for shard in np.unique(shards).tolist():
            at = begins[shards == shard] - self._before["input_ids"][shard]
            first[shards == shard] = self._shard("input_ids", shard)[at]
        return np.cumsum(first == begin) - 1

    def document_of_tokens(self, number: int, documents: Array) -> Array:
        """For each token of a sequence; `documents` of every piece."""
        pieces, _ = self._pieces(number if self._numbers is None else int(self._numbers[number]))
        first, last = self._extents("input_ids", pieces)
        return np.repeat(documents[pieces], last - first)

    def flat(self, first: int, stop: int) -> tuple[dict[str, Array], Array]:
        """input_ids, position_ids and targets of the sequences from `first` up to `stop`, end to end; their lengths."""
        read = [self.arrays(number) for number in range(first, min(stop, len(self)))]
        lengths = np.array([len(each["input_ids"]) for each in read], dtype=np.int64)
        names = ("input_ids", "position_ids", "targets")
        if not read:
            return {name: np.zeros(0, dtype=np.int64) for name in names}, lengths
        return {name: np.concatenate([each[name] for each in read]) for name in names}, lengths

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: str) -> list[Any]: ...
    @overload
    def __getitem__(self, at: slice) -> dict[str, list[Any]]: ...
    def __getitem__(self, at: int | str | slice) -> Any:
        """A sequence, a column, or the columns of some sequences; in lists."""
        if isinstance(at, str):
            return [each[at] for each in self]
        if isinstance(at, slice):
            rows = [self[number] for number in range(*at.indices(len(self)))]
            return {name: [row[name] for row in rows] for name in self.column_names}
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        read = self.arrays(at % len(self))
        return {name: read[name].tolist() for name in self.column_names}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[number] for number in range(len(self)))

    def to_list(self) -> list[dict[str, Any]]:
        return list(self)

    # Files

    def _pieces(self, number: int) -> tuple[Array, Array]:
        """Those of a sequence, and the shard of each."""
        pieces = np.array([number])
        if self._packed:
            starts = self._index("starts", np.dtype("<i8"))
            kind = np.dtype("<u4" if self._before["pieces"][-1] < 2**32 else "<i8")
            pieces = self._index("pieces", kind)[starts[number] : starts[number + 1]].astype(np.int64)
        return pieces, np.searchsorted(self._before["pieces"], pieces, side="right") - 1

    def _weights(self, pieces: Array, shards: Array) -> Array:
        first, last = self._extents("weights", pieces)
        values, times = (self._read(name, shards, first, last) for name in ("weights", "weight_counts"))
        return np.repeat(values, times)

    def _side(self, name: str, pieces: Array, shards: Array) -> tuple[dict[str, Array], Array]:
        """Tokens, positions and (of two tokenizers, the student's alone) targets; where in them each piece begins."""
        first, last = self._extents(name, pieces)
        lengths = last - first
        ends = np.cumsum(lengths)
        begins = ends - lengths
        ids = self._read(name, shards, first, last)
        teachers = name != "input_ids"
        if teachers and self.columns.prompted:
            texts = np.flatnonzero(self._bits("teacher_starts", name, shards, first, last))
        else:
            texts = begins[lengths > 0]
        found = {
            "input_ids": ids,
            "position_ids": np.arange(len(ids)) - np.repeat(texts, np.diff(texts, append=len(ids))),
        }
        if not teachers or self.columns.prompted:
            targets = np.append(ids[1:].astype(np.int64), IGNORED)
            targets[ends - 1] = IGNORED
            bits = "teacher_learnt" if teachers else "learnt"
            if bits in self._kinds:
                targets[~self._bits(bits, name, shards, first, last)] = IGNORED
            found["targets"] = targets
        return found, begins

    def _extents(self, name: str, pieces: Array) -> tuple[Array, Array]:
        """Where the pieces begin and end in a file, over all shards."""
        begin = self._index(f"{name}.begin", np.dtype("<i8"))
        return begin[pieces], begin[pieces + 1]

    def _read(self, name: str, shards: Array, first: Array, last: Array) -> Array:
        before = self._before[name][shards]
        places = zip(shards.tolist(), (first - before).tolist(), (last - before).tolist(), strict=True)
        parts = [self._shard(name, shard)[begin:end] for shard, begin, end in places]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _bits(self, name: str, of: str, shards: Array, first: Array, last: Array) -> Array:
        """As bools; there are as many as tokens in the file `of`."""
        before = self._before[of][shards]
        parts = []
        for shard, begin, end in zip(shards.tolist(), (first - before).tolist(), (last - before).tolist(), strict=True):
            bits = np.unpackbits(self._shard(name, shard)[begin // 8 : -(-end // 8)])
            parts.append(bits[begin % 8 : begin % 8 + end - begin])
        return np.concatenate(parts).astype(np.bool_)

    def _shard(self, name: str, number: int) -> Array:
        if (known := self._maps.get((name, number))) is None:
            path = self.folder / f"{number:05d}" / f"{name}.bin"
            known = self._maps[name, number] = mapped(path, self._kinds[name])
        return known

    def _index(self, name: str, kind: np.dtype[Any]) -> Array:
        if (known := self._maps.get((INDEX, name))) is None:
            known = self._maps[INDEX, name] = mapped(self.folder / INDEX / f"{name}.bin", kind)
        return known


def mapped(path: Path, kind: np.dtype[Any]) -> Array:
    """A file's numbers, memory mapped. Through torch, which keeps no file open: there can be more shards than a process
    may have files."""
    import torch

    if not (size := path.stat().st_size):
        return np.zeros(0, dtype=kind)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy().view(kind)


def _opened(folder: Path, numbers: Array | None, teachers: bool) -> Sequences:
    sequences = Sequences(folder)
    sequences._numbers, sequences._teachers = numbers, teachers
    return sequences
