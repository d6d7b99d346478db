"""Flat token files: pieces, end to end, of 2 or 4 bytes a token.

A folder of packed sequences holds

    00000, 00001, …   shards, in the order of the text, each whole or absent: what its pieces hold, end to end
        input_ids.bin         2 bytes a token where the vocabulary has 65,536 tokens at most, else 4
        learnt.bin            one bit a token: its target is supervised; without the file, all but a piece's last are
        weights.bin, weight_counts.bin    runs of one weight, float32, and their tokens, uint32 (data.weight_column)
        teacher_input_ids.bin             what a teacher reads instead, and
        spans.bin                         the spans between both, four int32 each, or
        teacher_learnt.bin, teacher_starts.bin    one bit a token: its target is supervised; a text begins with it
        .NAME.bin             a number for each piece, from which the index is made
        shard.json            what was counted, and the hash of every file
    index             where each piece begins, and which pieces make up which sequence (pipeline/data/sequences.py)
    sequences.json    which of these there are, and the shards' sizes

Positions, targets and lengths follow. All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from models.files import remove, sync, write_json
from models.targets import IGNORED

FORMAT = 1
SHARD = "shard.json"
Array = NDArray[Any]


@dataclass(frozen=True)
class Columns:
    """What the pieces of a split hold beside their tokens, and how large tokens are."""

    vocabulary: int
    learnt: bool = False  # what is supervised is written down; else all that has a next token is
    weights: bool = False
    teacher_vocabulary: int = 0  # a teacher reads something else
    spans: bool = False
    prompted: bool = False  # its prompts are its own

    @property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """File → what it holds; bits are in bytes."""
        found = {"input_ids": _token(self.vocabulary)}
        if self.learnt:
            found["learnt"] = np.dtype("u1")
        if self.weights:
            found |= {"weights": np.dtype("<f4"), "weight_counts": np.dtype("<u4")}
        if self.teacher_vocabulary:
            found["teacher_input_ids"] = _token(self.teacher_vocabulary)
        if self.spans:
            found["spans"] = np.dtype("<i4")
        if self.prompted:
            found |= {"teacher_learnt": np.dtype("u1"), "teacher_starts": np.dtype("u1")}
        return found

    @property
    def counts(self) -> list[str]:
        """Numbers of each piece: values in a file of that name, or of the others what their names say."""
        files = [name for name in ("input_ids", "weights", "teacher_input_ids", "spans") if name in self.kinds]
        return [*files, "bytes", *(["supervised"] if self.learnt else [])]


def _token(vocabulary: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary <= 2**16 else "<u4")


def bytes_a_token(vocabulary: int) -> int:
    """On disk, at most or so, of texts: a token of 2 or 4 bytes; of the index, and of bits of what is learnt, a byte.
    What a teacher with another tokenizer reads is not in it."""
    return _token(vocabulary).itemsize + 1


@dataclass
class Pieces:
    """Some pieces, end to end. None where `Columns` says that there is none."""

    input_ids: Array
    lengths: Array
    bytes: Array  # of each piece
    learnt: Array | None = None  # a bool for each token
    weights: Array | None = None  # float32, one for each token
    teacher_input_ids: Array | None = None
    teacher_lengths: Array | None = None
    teacher_learnt: Array | None = None
    teacher_starts: Array | None = None
    spans: Array | None = None  # four numbers each
    span_lengths: Array | None = None  # of each piece, in numbers


def end_to_end(lists: dict[str, list[Any]]) -> Pieces:
    """Pieces given as lists, one entry each: input_ids, targets, bytes, and what else there is of weights,
    teacher_input_ids, spans, teacher_targets and teacher_position_ids."""
    made = Pieces(_flat(lists["input_ids"]), _lengths(lists["input_ids"]), np.array(lists["bytes"], dtype=np.int64))
    made.learnt = _flat(lists["targets"]) != IGNORED
    if "weights" in lists:
        made.weights = _flat(lists["weights"], np.float32)
    if "teacher_input_ids" in lists:
        made.teacher_input_ids = _flat(lists["teacher_input_ids"])
        made.teacher_lengths = _lengths(lists["teacher_input_ids"])
    if "spans" in lists:
        made.spans, made.span_lengths = _flat(lists["spans"]), _lengths(lists["spans"])
    if "teacher_targets" in lists:
        made.teacher_learnt = _flat(lists["teacher_targets"]) != IGNORED
        made.teacher_starts = _flat(lists["teacher_position_ids"]) == 0
    return made


def _flat(parts: Sequence[Any], kind: type = np.int64) -> Array:
    return np.concatenate([np.zeros(0, dtype=kind), *(np.asarray(part, dtype=kind) for part in parts)])


def _lengths(parts: Sequence[Any]) -> Array:
    return np.array([len(part) for part in parts], dtype=np.int64)


class ShardWriter:
    """Writes pieces to a shard, which appears whole under its name when it is closed."""

    def __init__(self, folder: Path, columns: Columns) -> None:
        self.folder, self.columns = folder, columns
        # A name of its own: should two jobs make one shard at once, both make the same, and the first one's stays.
        self.aside = folder.with_name(f".{folder.name}.{uuid4().hex}.partial")
        self.aside.mkdir()
        names = [*columns.kinds, *(f".{name}" for name in columns.counts)]
        self._files = {name: (self.aside / f"{name}.bin").open("wb") for name in names}
        self._hashes = {name: hashlib.sha256() for name in names}
        self._bits: dict[str, Array] = {}  # fewer than eight, that wait for the others of their byte
        self._sizes = dict.fromkeys(("pieces", *columns.kinds), 0)

    def add(self, pieces: Pieces) -> None:
        if not len(pieces.lengths):
            return
        self._sizes["pieces"] += len(pieces.lengths)
        for name in ("input_ids", "teacher_input_ids", "spans"):
            if name in self.columns.kinds:
                self._put(name, getattr(pieces, name))
        for name in ("learnt", "teacher_learnt", "teacher_starts"):
            if name in self.columns.kinds:
                self._put_bits(name, getattr(pieces, name))
        counts = {
            "input_ids": pieces.lengths,
            "bytes": pieces.bytes,
            "teacher_input_ids": pieces.teacher_lengths,
            "spans": pieces.span_lengths,
        }
        begins = np.cumsum(pieces.lengths) - pieces.lengths
        if self.columns.learnt:
            assert pieces.learnt is not None
            counts["supervised"] = np.add.reduceat(pieces.learnt.astype(np.int64), begins)
        if self.columns.weights:
            assert pieces.weights is not None
            changes = np.append(True, pieces.weights[1:] != pieces.weights[:-1])
            changes[begins] = True
            runs = np.flatnonzero(changes)
            self._put("weights", pieces.weights[runs])
            self._put("weight_counts", np.diff(runs, append=len(pieces.weights)))
            counts["weights"] = np.add.reduceat(changes.astype(np.int64), begins)
        for name in self.columns.counts:
            self._write(f".{name}", np.asarray(counts[name]).astype("<u4"))

    def close(self, counted: dict[str, Any]) -> None:
        for name, bits in self._bits.items():
            self._write(name, np.packbits(bits))
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        hashes = {f"{name}.bin": self._hashes[name].hexdigest() for name in self.columns.kinds}
        write_json(
            self.aside / SHARD,
            {"columns": asdict(self.columns), "sizes": self._sizes, "counted": counted, "sha256": hashes},
        )
        sync(self.aside)
        try:
            os.rename(self.aside, self.folder)
        except OSError:
            if not (self.folder / SHARD).exists():
                raise
            remove(self.aside)  # another job was first
        sync(self.folder.parent)

    def drop(self) -> None:
        """Of a shard that is not to be, nothing is left."""
        for file in self._files.values():
            file.close()
        remove(self.aside)

    def _put(self, name: str, values: Array) -> None:
        kind = self.columns.kinds[name]
        self._sizes[name] += len(values)
        if kind == np.dtype("<u2") and len(values) and int(values.max()) >= 2**16:
            raise ValueError(f"{name}: token {int(values.max())} is beyond the vocabulary")
        self._write(name, values.astype(kind))

    def _put_bits(self, name: str, bits: Array) -> None:
        self._sizes[name] += len(bits)
        bits = np.concatenate([self._bits.get(name, np.zeros(0, dtype=np.bool_)), bits])
        whole = len(bits) // 8 * 8
        self._write(name, np.packbits(bits[:whole]))
        self._bits[name] = bits[whole:]

    def _write(self, name: str, values: Array) -> None:
        told = np.ascontiguousarray(values).tobytes()
        self._hashes[name].update(told)
        self._files[name].write(told)


@dataclass(frozen=True)
class Shard:
    """A shard on disk, as its shard.json says."""

    folder: Path
    columns: Columns
    sizes: dict[str, int]  # pieces, and values in each file; of bits, bits
    counted: dict[str, Any]
    sha256: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> Shard:
        told = json.loads((folder / SHARD).read_text())
        return cls(folder, columns_from(told["columns"]), told["sizes"], told["counted"], told["sha256"])

    def count(self, name: str) -> Array:
        """A number of each piece."""
        return np.fromfile(self.folder / f".{name}.bin", dtype="<u4")


def columns_from(told: dict[str, Any]) -> Columns:
    return Columns(**{each.name: told[each.name] for each in fields(Columns)})
