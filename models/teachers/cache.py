"""A teacher's signal on disk: of each piece of text, found by its key (models/teachers/pieces.py).

A folder holds `signal.json` (what decides the signal), the teacher's tokenizer and config, perhaps its head, and
shards (models/teachers/shards.py).

Legend: P pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open

from models.errors import Refusal
from models.files import write_json
from models.objectives.head import Head
from models.teachers.cache_index import Index
from models.teachers.encodings.encoding import Encoding, Payload, open_encoding
from models.teachers.pieces import scan
from models.teachers.shards import Shard, checksum_of, save_whole

HEADER, HEAD = "signal.json", "head.safetensors"


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
            f"teacher.cache={folder}: no readable {HEADER} in it; record the teacher's signal, or give the "
            f"folder that it was written to"
        ) from None


def write_header(folder: Path, header: Header) -> None:
    write_json(folder / HEADER, asdict(header))


class Cache:
    """Opened for reading: everything is memory mapped. Shards are opened, and what they say of themselves is verified,
    when they are first read; where no index was written (models/teachers/cache_index.py), all of them at once."""

    def __init__(self, folder: Path, header: Header | None = None) -> None:
        self.folder, self.header = folder, header or read_header(folder)
        self.encoding = self.header.open()
        self.fingerprint = self.header.fingerprint
        self.head: Head | None = None
        self._paths = shards_of(folder)
        self._opened: dict[int, Shard] = {}
        self.index = Index.read(folder, self._paths) or Index.of(self.shards)

    @property
    def shards(self) -> list[Shard]:
        return [self._shard(number) for number in range(len(self._paths))]

    def _shard(self, number: int) -> Shard:
        if number not in self._opened:
            self._opened[number] = Shard(self._paths[number])
        return self._opened[number]

    def __len__(self) -> int:
        return len(self.index)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.holds([key])[0])

    def holds(self, keys: Sequence[bytes]) -> Bool[np.ndarray, " P"]:
        return self._find(keys) >= 0

    def check_holds(self, rows: Any) -> None:
        """Refuse, before a step is made, prepared rows (see pieces.scan) with a piece that is not here."""
        for _, _, keys in scan(rows, self.fingerprint):
            self._found(keys)

    def read(self, keys: Sequence[bytes], device: torch.device) -> Payload:
        """The fields of these pieces, end to end."""
        at_P = self._found(keys)
        places = zip(keys, self.index.shard[at_P].tolist(), self.index.place[at_P].tolist(), strict=True)
        pieces = [self._shard(shard).piece(place, key) for key, shard, place in places]
        payload = {}
        for number, (name, (dtype, tail)) in enumerate(self._shard(0).kinds.items() if self._paths else ()):
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
                    whole = (handle.metadata() or {}).get("checksum") == checksum_of(tensors)
            except (OSError, SafetensorError, KeyError):
                whole = False
            if not whole:
                raise Refusal(
                    f"{self.folder / HEAD} is damaged; remove {self.folder} and record the teacher's signal again"
                )
            tensors = {name: tensor.to(device, dtype) for name, tensor in tensors.items()}
            self.head = Head(tensors["weight"], tensors.get("bias"), **self.header.head)
        return self.head

    def close(self) -> None:
        """Let go of the files."""
        self._opened.clear()

    def _found(self, keys: Sequence[bytes]) -> Int[np.ndarray, " P"]:
        at_P = self._find(keys)
        if (at_P < 0).any():
            raise Refusal(
                f"teacher.cache={self.folder}: a piece of the text is not in it ({len(self):,} pieces are); it was "
                f"recorded from other text, or with another data.max_length: record the teacher's signal on this data"
            )
        return at_P

    def _find(self, keys: Sequence[bytes]) -> Int[np.ndarray, " P"]:
        """Where among the sorted keys, or -1."""
        return self.index.find(np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def write_index(folder: Path) -> None:
    """Beside the shards of a folder: whoever opens it need not read all of them."""
    paths = shards_of(folder)
    Index.of([Shard(path) for path in paths]).write(folder, paths)


def save_head(folder: Path, head: Head) -> None:
    given = {"bias": head.bias, "weight": head.weight}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items() if tensor is not None}
    save_whole(tensors, folder / HEAD, {"checksum": checksum_of(tensors)})
