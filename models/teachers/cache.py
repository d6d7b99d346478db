"""A teacher's signal on disk: pieces of text by the hash of their tokens, in shards.

A piece is a document, or a window of one, as it stands in a packed sequence: what the teacher reads. Its key is
the hash of its token ids, of which of them are supervised, and of everything else that decides the signal (teacher,
tokenizer, template, dtype, encoding). So a cache does not care about shuffling, packing, accumulation, the number of
ranks, epochs or students.

A folder holds `signal.json` (what decides the signal), the teacher's tokenizer and config, perhaps its head, and
shards: safetensors files, each written aside, synced and renamed, with the pieces' fields end to end, offsets and keys.
Every piece has a checksum that is verified whenever it is read; the index, and what a file says of its tensors, have
one that is verified when the cache is opened.

Legend: P pieces, N supervised tokens; B sequences of T tokens, H hidden width.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.errors import Refusal
from models.objectives.head import Head
from models.targets import IGNORED
from models.teachers.encodings.encoding import Encoding, Payload, open_encoding

HEADER, HEAD = "signal.json", "head.safetensors"
_KEY_BYTES = 16
_ROWS_AT_ONCE = 1000
# safetensors' names of what payloads are made of
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U16": torch.uint16, "U8": torch.uint8},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Everything beside the tokens that decides a signal."""

    encoding: dict[str, Any]
    vocabulary: int  # tokens of the tokenizer: columns beyond are left out
    teacher: str  # content hash, or the endpoint and the name of its model
    tokenizer: str  # hash
    template: str | None  # hash of the chat template, where there is one
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
    aside = folder / f".{HEADER}.partial"
    aside.write_text(json.dumps(asdict(header), indent=2) + "\n")
    _publish(aside, folder / HEADER)


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


def scan(rows: Any, fingerprint: bytes) -> Iterator[tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"], list[bytes]]]:
    """The pieces of prepared rows that have supervised tokens, some at a time: row numbers, supervised tokens, keys.

    `rows`: a datasets.Dataset. Read as Arrow: as Python lists, ten billion tokens would take half an hour.
    """
    arrow = rows.with_format("arrow")
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        table = arrow[first : first + _ROWS_AT_ONCE]
        columns = [table[name].combine_chunks() for name in ("input_ids", "position_ids", "targets")]
        ends = np.cumsum(columns[0].value_lengths().to_numpy())
        pieces = list(_cut([column.flatten().to_numpy() for column in columns], fingerprint))
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
        shape_of = {name: (_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}
        index = {name: _bytes_of(tensor) for name, tensor in tensors.items() if _is_index(name)}
        path = self.folder / f"shard-{self.rank:04d}-{self.number:06d}.safetensors"
        _save(tensors, path, {"index": str(_index_checksum(shape_of, index))})
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
            self.kinds[name] = (_DTYPES[dtype], tail)

    def piece(self, place: int) -> list[np.ndarray]:
        """The rows of each field, as bytes."""
        parts = [rows[offsets[place] : offsets[place + 1]] for offsets, rows in self.fields]
        if _checksum(self.keys_P2[place].tobytes(), parts) != self.checksums_P[place]:
            raise self._damaged()
        return parts

    def verify(self) -> None:
        """Every piece; a damaged one is refused with the shard's name."""
        for place in range(len(self.keys_P2)):
            self.piece(place)

    def _damaged(self) -> Refusal:
        return Refusal(f"{self.path} is damaged; remove it and run the stage record again, which records what it held")


class Cache:
    """Opened for reading: the keys of all shards in memory, 28 bytes a piece, and everything else memory mapped."""

    def __init__(self, folder: Path, header: Header | None = None) -> None:
        self.folder, self.header = folder, header or read_header(folder)
        self.encoding = self.header.open()
        self.fingerprint = self.header.fingerprint
        self.head: Head | None = None
        self.shards = [Shard(path) for path in sorted(folder.glob("shard-*.safetensors"))]
        keys_P2 = np.concatenate([np.zeros((0, 2), dtype=np.uint64), *(shard.keys_P2 for shard in self.shards)])
        sizes = [len(shard.keys_P2) for shard in self.shards]
        order = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
        self.first_P, self.second_P = (np.ascontiguousarray(keys_P2[order, half]) for half in (0, 1))
        shard_of = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        place = np.concatenate([np.zeros(0, dtype=np.int32), *(np.arange(size, dtype=np.int32) for size in sizes)])
        self.shard_of, self.place = shard_of[order], place[order]

    def __len__(self) -> int:
        return len(self.first_P)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[bytes]) -> Bool[np.ndarray, " P"]:
        return self._find(keys) >= 0

    def check_holds(self, rows: Any) -> None:
        """Refuse, before a step is made, prepared rows (a datasets.Dataset) with a piece that is not here."""
        for _, _, keys in scan(rows, self.fingerprint):
            self._found(keys)

    def read(self, keys: Sequence[bytes], device: torch.device) -> Payload:
        """The fields of these pieces, end to end."""
        at_P = self._found(keys)
        places = zip(self.shard_of[at_P].tolist(), self.place[at_P].tolist(), strict=True)
        pieces = [self.shards[shard].piece(place) for shard, place in places]
        payload = {}
        for number, (name, (dtype, tail)) in enumerate(self.shards[0].kinds.items() if self.shards else ()):
            parts = [piece[number] for piece in pieces]
            count = sum(map(len, parts))
            # From pinned memory the copy to a GPU goes on beside the student's forward.
            rows = torch.empty((count, *tail), dtype=dtype, pin_memory=device.type == "cuda")
            if count:
                np.concatenate(parts, out=rows.view(count, -1).view(torch.uint8).numpy())
            payload[name] = rows.to(device, non_blocking=True)
        return payload

    def open_head(self, device: torch.device, dtype: torch.dtype) -> Head | None:
        """The teacher's head, where the encoding needs it."""
        if self.encoding.keeps_head and self.head is None:
            try:
                with safe_open(self.folder / HEAD, "pt") as handle:
                    tensors = {name: handle.get_tensor(name) for name in sorted(handle.keys())}
                    whole = (handle.metadata() or {}).get("checksum") == _head_checksum(tensors)
            except (OSError, SafetensorError, KeyError):
                whole = False
            if not whole:
                raise Refusal(f"{self.folder / HEAD} is damaged; remove {self.folder} and run the stage record again")
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            self.head = Head(tensors["weight"], tensors.get("bias"), **self.header.head)
        return self.head

    def close(self) -> None:
        """Let go of the files."""
        self.shards.clear()

    def _found(self, keys: Sequence[bytes]) -> Int[np.ndarray, " P"]:
        at_P = self._find(keys)
        if (at_P < 0).any():
            raise Refusal(
                f"teacher.cache={self.folder}: a piece of the text is not in it ({len(self):,} pieces are); it was "
                f"recorded from other text, or with another data.max_length: run the stage record on this data"
            )
        return at_P

    def _find(self, keys: Sequence[bytes]) -> Int[np.ndarray, " P"]:
        """Where among the sorted keys, or -1."""
        wanted_P2 = np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2)
        at_P = np.searchsorted(self.first_P, wanted_P2[:, 0])
        found_P = np.full(len(wanted_P2), -1)
        open_P = np.arange(len(wanted_P2))
        while len(open_P := open_P[at_P[open_P] < len(self)]):
            at, wanted = at_P[open_P], wanted_P2[open_P]
            open_P, at, wanted = (each[self.first_P[at] == wanted[:, 0]] for each in (open_P, at, wanted))
            same = self.second_P[at] == wanted[:, 1]
            found_P[open_P[same]] = at[same]
            open_P = open_P[~same]  # two keys that are alike in their first half
            at_P[open_P] += 1
        return found_P


def save_head(folder: Path, head: Head) -> None:
    given = {"bias": head.bias, "weight": head.weight}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items() if tensor is not None}
    _save(tensors, folder / HEAD, {"checksum": _head_checksum(tensors)})


def _head_checksum(tensors: dict[str, Tensor]) -> str:
    shape_of = {name: (_NAMES[tensor.dtype], list(tensor.shape)) for name, tensor in tensors.items()}
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


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Aside, synced, renamed: under its name a file is whole."""
    aside = path.with_name(f".{path.name}.partial")
    save_file(tensors, aside, metadata=metadata)
    _publish(aside, path)


def _publish(aside: Path, path: Path) -> None:
    _sync(aside)
    os.rename(aside, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
