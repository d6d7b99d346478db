"""The files of a teacher's cache: safetensors with the fields of many pieces end to end, offsets, keys and checksums.

Each is written aside, synced and renamed: under its name it is whole. Every piece has a checksum that is verified
whenever it is read; the index, and what a file says of its tensors, have one that is verified when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.dtypes import DTYPE_OF, name_of
from models.errors import Refusal
from models.files import written_aside
from models.teachers.encodings.encoding import Payload


class Writer:
    """Gathers pieces and writes them as shards into `folder`; `rank` keeps writers apart."""

    def __init__(self, folder: Path, rank: int, shard_bytes: int) -> None:
        self.folder, self.rank, self.shard_bytes = folder, rank, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        mine = [int(path.stem.split("-")[2]) for path in folder.glob(f"shard-{rank:04d}-*.safetensors")]
        self.number = max(mine, default=-1) + 1
        self.pieces: list[tuple[bytes, Payload]] = []
        self.bytes, self.flushed = 0, time.monotonic()

    def add(self, key: bytes, payload: Payload) -> None:
        payload = {name: tensor.detach().cpu().contiguous() for name, tensor in payload.items()}
        self.pieces.append((key, payload))
        self.bytes += sum(tensor.nbytes for tensor in payload.values())
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        if not self.pieces:
            return
        names = sorted(self.pieces[0][1])
        tensors: dict[str, Tensor] = {}
        for name in names:
            parts = [payload[name] for _, payload in self.pieces]
            tensors[name] = torch.cat(parts)
            tensors[f"{name}.offsets"] = torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)
        tensors["keys"] = torch.frombuffer(bytearray(b"".join(key for key, _ in self.pieces)), dtype=torch.uint8)
        sums = [_checksum(key, [_bytes_of(payload[name]) for name in names]) for key, payload in self.pieces]
        tensors["checksums"] = torch.tensor(sums, dtype=torch.int64)
        shape_of = {name: (name_of(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
        index = {name: _bytes_of(tensor) for name, tensor in tensors.items() if _is_index(name)}
        path = self.folder / f"shard-{self.rank:04d}-{self.number:06d}.safetensors"
        save_whole(tensors, path, {"index": str(_index_checksum(shape_of, index))})
        self.number, self.pieces, self.bytes, self.flushed = self.number + 1, [], 0, time.monotonic()

    def flush_after(self, seconds: float) -> None:
        if time.monotonic() - self.flushed > seconds:
            self.flush()


class Shard:
    """One file, memory mapped. What it says of itself is verified when it is opened, a piece when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._open()
        except (OSError, ValueError, KeyError, TypeError, SafetensorError):
            raise self._damaged() from None

    def _open(self) -> None:
        with safe_open(self.path, "np") as handle:  # verifies that the tensors fill the file, side by side
            told = (handle.metadata() or {}).get("index")
        # Through torch, which keeps no file open: a cache can have more shards than a process may have files.
        size = self.path.stat().st_size
        file_B = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        body = 8 + int(file_B[:8].view(np.uint64)[0])
        entries = json.loads(file_B[8:body].tobytes())
        entries.pop("__metadata__", None)
        flat = {
            name: file_B[body + entry["data_offsets"][0] : body + entry["data_offsets"][1]]
            for name, entry in entries.items()
        }
        shape_of = {name: (entry["dtype"], entry["shape"]) for name, entry in entries.items()}
        if told != str(_index_checksum(shape_of, {name: flat[name] for name in flat if _is_index(name)})):
            raise ValueError
        self.keys_P2 = flat["keys"].view(np.uint64).reshape(-1, 2)
        self.checksums_P = flat["checksums"].view(np.int64)
        # Of each field, by name: where the pieces begin, and its rows as bytes; how these are to be read.
        self.fields: list[tuple[np.ndarray, np.ndarray]] = []
        self.kinds: dict[str, tuple[torch.dtype, list[int]]] = {}
        for name in sorted(name for name in entries if not _is_index(name)):
            dtype, (rows, *tail) = shape_of[name]
            self.fields.append((flat[f"{name}.offsets"].view(np.int64), flat[name].reshape(rows, -1)))
            self.kinds[name] = (DTYPE_OF[dtype], tail)

    def piece(self, place: int, key: bytes | None = None) -> list[np.ndarray]:
        """The rows of each field, as bytes. `key`: whose piece it is known to be."""
        if key is not None and (place >= len(self.keys_P2) or self.keys_P2[place].tobytes() != key):
            raise self._damaged()
        parts = [rows[offsets[place] : offsets[place + 1]] for offsets, rows in self.fields]
        if _checksum(self.keys_P2[place].tobytes(), parts) != self.checksums_P[place]:
            raise self._damaged()
        return parts

    @property
    def name_by_content(self) -> str:
        """The same of the same pieces, and not one that a writer gives."""
        told = hashlib.sha256(self.keys_P2.tobytes())
        told.update(self.checksums_P.tobytes())
        return f"shard-of-{told.hexdigest()[:24]}.safetensors"

    def verify(self) -> None:
        """Every piece; a damaged one is refused with the shard's name."""
        for place in range(len(self.keys_P2)):
            self.piece(place)

    def _damaged(self) -> Refusal:
        return Refusal(
            f"{self.path} is damaged; remove it and record the teacher's signal again, which adds what it held"
        )


def checksum_of(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes."""
    shape_of = {name: (name_of(tensor.dtype), list(tensor.shape)) for name, tensor in tensors.items()}
    return str(_index_checksum(shape_of, {name: _bytes_of(tensor) for name, tensor in tensors.items()}))


def _is_index(name: str) -> bool:
    return name.endswith(".offsets") or name in ("keys", "checksums")


def _index_checksum(shape_of: dict[str, tuple[str, list[int]]], index: dict[str, np.ndarray]) -> int:
    """Of these bytes, and of every tensor's name, dtype and shape: in a file's header a byte can flip too."""
    told = json.dumps([[name, *shape_of[name]] for name in sorted(shape_of)]).encode()
    return _checksum(told, [index[name] for name in sorted(index)])


def _checksum(begin: bytes, parts: list[np.ndarray]) -> int:
    total = zlib.crc32(begin)
    for part in parts:
        total = zlib.crc32(part.data if part.size else b"", total)
    return total


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Under its name a file is whole."""
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata=metadata)
