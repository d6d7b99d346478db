"""Files that are whole under their name, and known to be what was written. Imports nothing heavy.

A file or folder is written under another name, synced, and renamed last: whoever is killed in between leaves the old
one, the new one, or none.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(aside: Path, path: Path) -> None:
    """Give a file that was written aside its name."""
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def aside_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A reader never sees half a file, and where the file system refuses the write no half of it is left."""
    aside = aside_of(path)
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise


def remove(path: Path) -> None:
    """A folder, a file or a link; what a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def hash_of(value: Any) -> str:
    """Of what can be written as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def checksum(begin: bytes, arrays: Mapping[str, np.ndarray]) -> str:
    """Of some bytes, and of arrays' names, dtypes, shapes and contents."""
    import numpy as np

    told = json.dumps([[name, str(arrays[name].dtype), list(arrays[name].shape)] for name in sorted(arrays)])
    total = zlib.crc32(told.encode(), zlib.crc32(begin))
    for name in sorted(arrays):
        each = np.ascontiguousarray(arrays[name])
        total = zlib.crc32(each.view(np.uint8).data if each.size else b"", total)
    return str(total)
