"""The pieces of text that a teacher reads, and the key of each.

A piece is a document, or a window of one, as it stands in a packed sequence. Its key is the hash of its token ids, of
which of them are supervised, and of everything else that decides the teacher's signal (the fingerprint of its cache's
header). So a signal is found again whatever the shuffling, packing, accumulation, number of ranks, epochs or students.

Legend: P pieces, N supervised tokens; B sequences of T tokens, H hidden width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.targets import IGNORED

_KEY_BYTES = 16
_ROWS_AT_ONCE = 1000


@dataclass(frozen=True)
class Piece:
    """Where it stands in a batch, and its key."""

    row: int
    supervised: np.ndarray  # positions in the sequence
    start: int
    stop: int
    key: bytes

    def states(self, hidden: Float[Tensor, "B T H"]) -> Float[Tensor, "N H"]:
        """Those of a batch at the supervised tokens of this piece."""
        return hidden[self.row][torch.from_numpy(self.supervised).to(hidden.device)]


def pieces_of(batch: dict[str, Any], fingerprint: bytes) -> list[Piece]:
    """The pieces of a batch that have supervised tokens, in the order in which these stand in it."""
    names = ("input_ids", "position_ids", "targets")
    arrays = [np.asarray(torch.as_tensor(batch[name]).cpu()) for name in names]
    width = arrays[0].shape[1]
    found = []
    for start, stop, supervised, key in _cut([array.reshape(-1) for array in arrays], fingerprint):
        row = start // width
        found.append(Piece(row, start - row * width + supervised, start - row * width, stop - row * width, key))
    return found


def scan(
    rows: Any, fingerprint: bytes, numbers: range | None = None
) -> Iterator[tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], list[bytes]]]:
    """The pieces of prepared rows that have supervised tokens, some at a time: row numbers, supervised tokens, keys.

    `rows`: pipeline.data.sequences.Sequences; `numbers`: of those that are read, without gaps. None: all.
    """
    numbers = range(len(rows)) if numbers is None else numbers
    for first in numbers[::_ROWS_AT_ONCE]:
        read, lengths = rows.flat(first, min(first + _ROWS_AT_ONCE, numbers.stop))
        ends = np.cumsum(lengths)
        pieces = list(_cut([read[name] for name in ("input_ids", "position_ids", "targets")], fingerprint))
        starts = np.array([start for start, *_ in pieces], dtype=np.int64)
        counts = np.array([len(supervised) for _, _, supervised, _ in pieces], dtype=np.int64)
        yield first + np.searchsorted(ends, starts, side="right"), counts, [key for *_, key in pieces]


def _cut(columns: list[np.ndarray], fingerprint: bytes) -> Iterator[tuple[int, int, np.ndarray, bytes]]:
    """Start, stop, supervised places counted from the start, and key of every piece that has such places.

    `columns`: ids, positions and targets of rows end to end.
    """
    ids_T, positions_T, targets_T = columns
    starts = np.flatnonzero(positions_T == 0).tolist()
    for start, stop in zip(starts, [*starts[1:], len(ids_T)], strict=True):
        supervised = np.flatnonzero(targets_T[start:stop] != IGNORED)
        if len(supervised):
            yield start, stop, supervised, key_of(ids_T[start:stop], targets_T[start:stop], fingerprint)


def key_of(ids_T: np.ndarray, targets_T: np.ndarray, fingerprint: bytes) -> bytes:
    told = hashlib.blake2b(fingerprint, digest_size=_KEY_BYTES)
    told.update(np.ascontiguousarray(ids_T, dtype=np.int32).tobytes())
    told.update(np.packbits(np.asarray(targets_T) != IGNORED).tobytes())
    return told.digest()
