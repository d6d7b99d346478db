"""Where in a teacher's cache each piece stands: keys in their order, the shard of each and its place in it.

The stage `record` writes it down beside the shards, so that a cache opens at once whatever its size, and the keys are
the file system's to hold. Without it, or beside shards of other names or sizes, it is made from the shards, in memory.
It is never believed alone: who reads a piece compares the key that stands beside it in its shard.

Legend: P pieces.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from models.teachers.shards import Shard, save_whole

INDEX = "index.safetensors"
_KINDS = {"first": np.uint64, "second": np.uint64, "shard": np.int32, "place": np.int32}


@dataclass(frozen=True)
class Index:
    """Both halves of every key, ascending; its shard by number, and its place there."""

    first: np.ndarray
    second: np.ndarray
    shard: np.ndarray
    place: np.ndarray

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> Index:
        keys_P2 = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *(shard.keys_P2 for shard in shards)])
        sizes = [len(shard.keys_P2) for shard in shards]
        order = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
        shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        place = np.concatenate([np.zeros(0, dtype=np.int32), *(np.arange(size, dtype=np.int32) for size in sizes)])
        first, second = (np.ascontiguousarray(keys_P2[order, half]) for half in (0, 1))
        return cls(first, second, shard_of[order], place[order])

    @classmethod
    def read(cls, folder: Path, paths: Sequence[Path]) -> Index | None:
        """The one that was written of these shards, memory mapped; None where there is none."""
        path = folder / INDEX
        try:
            with safe_open(path, "np") as handle:  # verifies that the tensors fill the file, side by side
                if (handle.metadata() or {}).get("shards") != _told(paths):
                    return None
            size = path.stat().st_size
            # Through torch, which keeps no file open.
            file_B = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
            body = 8 + int(file_B[:8].view(np.uint64)[0])
            entries = json.loads(file_B[8:body].tobytes())
            flat = {name: entries[name]["data_offsets"] for name in _KINDS}
            return cls(*(file_B[body + flat[n][0] : body + flat[n][1]].view(kind) for n, kind in _KINDS.items()))
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            return None

    def write(self, folder: Path, paths: Sequence[Path]) -> None:
        tensors = {name: torch.from_numpy(np.ascontiguousarray(getattr(self, name))) for name in _KINDS}
        save_whole(tensors, folder / INDEX, {"shards": _told(paths)})

    def __len__(self) -> int:
        return len(self.first)

    def find(self, wanted_P2: np.ndarray) -> Int[np.ndarray, " P"]:
        """Where among the sorted keys, or -1."""
        at_P = np.searchsorted(self.first, wanted_P2[:, 0])
        found_P = np.full(len(wanted_P2), -1)
        open_P = np.arange(len(wanted_P2))
        while len(open_P := open_P[at_P[open_P] < len(self)]):
            at, wanted = at_P[open_P], wanted_P2[open_P]
            open_P, at, wanted = (each[self.first[at] == wanted[:, 0]] for each in (open_P, at, wanted))
            same = self.second[at] == wanted[:, 1]
            found_P[open_P[same]] = at[same]
            open_P = open_P[~same]  # two keys that are alike in their first half
            at_P[open_P] += 1
        return found_P


def _told(paths: Sequence[Path]) -> str:
    return json.dumps([[path.name, path.stat().st_size] for path in paths])
