"""A teacher's signal on disk: pieces of text by the hash of their tokens, in shards.

A piece is a document, or a window of one, as it stands in a row: what the teacher has read when it speaks. Its key is
the hash of its token ids, of which of them are supervised, and of everything else that decides the signal (teacher,
tokenizer, template, dtype, encoding). So a cache does not care about shuffling, packing, accumulation, the number of
ranks, epochs or students.

A folder holds `signal.json` (what decides the signal), the teacher's tokenizer and config, perhaps its head, and
shards: safetensors files, each written aside, synced and renamed, with the pieces' fields end to end, offsets and keys.
Every piece has a checksum that is verified whenever it is read.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.encodings.encoding import Encoding, Payload, open_encoding
from models.errors import Refusal
from models.objectives.head import Head

HEADER, HEAD = "signal.json", "head.safetensors"
IGNORED = -100


@dataclass(frozen=True)
class Header:
    """Everything beside the tokens that decides a signal."""

    encoding: dict[str, Any]
    vocabulary: int  # tokens of the tokenizer: columns beyond are left out
    teacher: str  # content hash, or the endpoint and the name of its model
    tokenizer: str  # hash
    template: str | None  # hash of the chat template, where the data are conversations
    dtype: str
    head: dict[str, Any] = field(default_factory=dict)  # scale and softcap, where the head is kept

    @property
    def fingerprint(self) -> bytes:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).digest()

    def open(self) -> Encoding:
        return open_encoding(self.encoding)


def read_header(folder: Path) -> Header:
    try:
        return Header(**json.loads((folder / HEADER).read_text()))
    except (OSError, ValueError, TypeError):
        raise Refusal(
            f"teacher.cache={folder}: no readable {HEADER} in it; run the stage record, or give the folder it wrote"
        ) from None


def write_header(folder: Path, header: Header) -> None:
    (folder / HEADER).write_text(json.dumps(asdict(header), indent=2) + "\n")


@dataclass(frozen=True)
class Piece:
    """Where it stands in a batch, and its key."""

    row: int
    supervised: np.ndarray  # positions in the row
    start: int
    stop: int
    key: bytes


def pieces_of(batch: dict[str, Any], fingerprint: bytes) -> list[Piece]:
    """The pieces of a batch that have supervised tokens, in the order in which these stand in it."""
    found = []
    arrays = (np.asarray(torch.as_tensor(batch[name]).cpu()) for name in ("input_ids", "position_ids", "targets"))
    for row, (ids, positions, targets) in enumerate(zip(*arrays, strict=True)):
        starts = np.flatnonzero(positions == 0)
        for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
            supervised = np.flatnonzero(targets[start:stop] != IGNORED)
            if len(supervised):
                key = key_of(ids[start:stop], targets[start:stop], fingerprint)
                found.append(Piece(row, start + supervised, int(start), int(stop), key))
    return found


def key_of(ids_T: np.ndarray, targets_T: np.ndarray, fingerprint: bytes) -> bytes:
    told = hashlib.blake2b(fingerprint, digest_size=16)
    told.update(np.ascontiguousarray(ids_T, dtype=np.int32).tobytes())
    told.update(np.packbits(np.asarray(targets_T) != IGNORED).tobytes())
    return told.digest()


def seed_of(key: bytes) -> int:
    """For encodings that draw: the piece decides, not the order or the rank."""
    return int.from_bytes(key[:8], "little") >> 1


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
        sums = [_checksum(key, [payload[name] for name in names]) for key, payload in self.pieces]
        tensors["checksums"] = torch.tensor(sums, dtype=torch.int64)
        path = self.folder / f"shard-{self.rank:04d}-{self.number:06d}.safetensors"
        aside = self.folder / f".{path.name}.partial"
        save_file(tensors, aside, metadata={"index": str(_index_checksum(tensors))})
        _sync(aside)
        os.rename(aside, path)
        _sync(self.folder)
        self.number, self.pieces, self.bytes, self.flushed = self.number + 1, [], 0, time.monotonic()

    def flush_after(self, seconds: float) -> None:
        if time.monotonic() - self.flushed > seconds:
            self.flush()


class Cache:
    """Opened for reading: an index of every shard in memory, the fields memory mapped."""

    def __init__(self, folder: Path, header: Header | None = None) -> None:
        self.folder, self.header = folder, header or read_header(folder)
        self.encoding = self.header.open()
        self.fingerprint = self.header.fingerprint
        self.head: Head | None = None
        self.shards = sorted(folder.glob("shard-*.safetensors"))
        self.opened: dict[int, Any] = {}
        self.offsets: list[dict[str, np.ndarray]] = []
        self.checksums: list[np.ndarray] = []
        keys, shard_of, place = [], [], []
        for number, path in enumerate(self.shards):
            index = self._index(path)
            mine = index.pop("keys").reshape(-1, 16).copy().view(np.uint64)
            self.checksums.append(index.pop("checksums"))
            self.offsets.append({name.removesuffix(".offsets"): values for name, values in index.items()})
            keys.append(mine)
            shard_of.append(np.full(len(mine), number, dtype=np.int32))
            place.append(np.arange(len(mine), dtype=np.int32))
        every = np.concatenate(keys) if keys else np.zeros((0, 2), dtype=np.uint64)
        order = np.lexsort((every[:, 1], every[:, 0]))
        self.keys = every[order]
        self.shard_of, self.place = (np.concatenate(each)[order] if keys else every[:, 0] for each in (shard_of, place))

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: bytes) -> bool:
        return self._find(key) is not None

    def read(self, keys: Iterable[bytes], device: torch.device) -> Payload:
        """The fields of these pieces, end to end."""
        pieces = [self._piece(key) for key in keys]
        return {name: torch.cat([piece[name] for piece in pieces]).to(device) for name in (pieces[0] if pieces else ())}

    def open_head(self, device: torch.device, dtype: torch.dtype) -> Head | None:
        """The teacher's head, where the encoding needs it."""
        if self.encoding.keeps_head and self.head is None:
            try:
                with safe_open(self.folder / HEAD, "pt") as handle:
                    tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
                    whole = (handle.metadata() or {}).get("checksum") == str(_checksum(b"", list(tensors.values())))
            except (OSError, SafetensorError):
                whole = False
            if not whole:
                raise Refusal(f"{self.folder / HEAD} is damaged; remove {self.folder} and run the stage record again")
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            self.head = Head(tensors["weight"], tensors.get("bias"), **self.header.head)
        return self.head

    def _piece(self, key: bytes) -> Payload:
        found = self._find(key)
        if found is None:
            raise Refusal(
                f"teacher.cache={self.folder}: a piece of the text is not in it ({len(self):,} pieces are); it was "
                f"recorded of other text, or cut to another data.max_length: run the stage record on this data"
            )
        shard, place = found
        if shard not in self.opened:
            self.opened[shard] = safe_open(self.shards[shard], "pt")
        handle = self.opened[shard]
        offsets = self.offsets[shard]
        piece = {
            name: handle.get_slice(name)[int(offsets[name][place]) : int(offsets[name][place + 1])]
            for name in sorted(offsets)
        }
        if _checksum(key, list(piece.values())) != self.checksums[shard][place]:
            raise Refusal(f"{self.shards[shard]} is damaged; remove it and run the stage record again")
        return piece

    def _find(self, key: bytes) -> tuple[int, int] | None:
        first, second = np.frombuffer(key, dtype=np.uint64)
        at = int(np.searchsorted(self.keys[:, 0], first))
        while at < len(self.keys) and self.keys[at, 0] == first:
            if self.keys[at, 1] == second:
                return int(self.shard_of[at]), int(self.place[at])
            at += 1
        return None

    def _index(self, path: Path) -> dict[str, np.ndarray]:
        try:
            with safe_open(path, "pt") as handle:
                names = [n for n in handle.keys() if n.endswith(".offsets") or n in ("keys", "checksums")]
                tensors = {name: handle.get_tensor(name) for name in names}
                whole = (handle.metadata() or {}).get("index") == str(_index_checksum(tensors))
        except (OSError, SafetensorError):
            whole = False
        if not whole:
            raise Refusal(f"{path} is damaged; remove it and run the stage record again")
        return {name: tensor.numpy() for name, tensor in tensors.items()}


def save_head(folder: Path, head: Head) -> None:
    given = {"bias": head.bias, "weight": head.weight}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items() if tensor is not None}
    save_file(tensors, folder / HEAD, metadata={"checksum": str(_checksum(b"", list(tensors.values())))})


def _checksum(key: bytes, tensors: list[Tensor]) -> int:
    total = zlib.crc32(key)
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data, total)
    return total


def _index_checksum(tensors: dict[str, Tensor]) -> int:
    names = sorted(name for name in tensors if name.endswith(".offsets") or name in ("keys", "checksums"))
    return _checksum(b"", [tensors[name] for name in names])


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
