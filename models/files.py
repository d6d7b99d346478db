"""Files that are whole under their name, and known to be what was written. Imports nothing heavy.

A file or folder is written under another name, synced, and renamed last: whoever is killed in between leaves the old
one, the new one, or none. That other name is ours: what lies there is removed first, since whoever writes to a link
writes to what it leads to.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name to write a file under; at the end of the block it gets its own. Of a write that fails nothing is left."""
    aside = path.with_name(f".{path.name}.partial")
    remove(aside)
    try:
        yield aside
        sync(aside)
        os.replace(aside, path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A reader never sees half a file, and where the file system refuses the write no half of it is left."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """Raises OSError where there is no ordinary file: of a FIFO nobody could tell when it will be written to."""
    with open(path, encoding="utf-8", opener=_open_ordinary) as file:
        return file.read()


def _open_ordinary(path: str, flags: int) -> int:
    handle = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is no ordinary file", path)
    return handle


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
