"""A disk that is full at a chosen call, for every process of a command: tests/full_disk.c, compiled and preloaded."""

from __future__ import annotations

import errno
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

COMPILER = shutil.which("cc") if sys.platform == "linux" else None
SOURCE = Path(__file__).with_suffix(".c")
_RECORD, _RECORDS, _NAME = 512, 65536, 496  # bytes, and how many; as in the C file
_HEAD = struct.calcsize("4q") + 2 * _NAME


class FullDisk:
    """Of what lies under the folder `under`. `environment` is what the command needs."""

    def __init__(self, folder: Path, under: Path) -> None:
        library, shared = folder / "full_disk.so", folder / "calls"
        assert COMPILER is not None
        subprocess.run([COMPILER, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        self.environment = {"LD_PRELOAD": str(library), "RETORT_TEST_DISK": str(shared)}
        self.under, self._name = under, str(shared)
        with open(shared, "wb") as file:
            file.truncate(_HEAD + _RECORDS * _RECORD)
        with open(shared, "r+b") as file:
            self._shared = mmap.mmap(file.fileno(), 0)

    def refuse(self, pattern: str, code: int = errno.ENOSPC, every: bool = False) -> None:
        """From now on: the first call that fits `pattern`, such as "write *.json", and with `every` each one after
        it. An empty pattern refuses none. What was called before is forgotten."""
        words = [text.encode().ljust(_NAME, b"\0") for text in (pattern, str(self.under))]
        self._shared[:_HEAD] = struct.pack("4q", 0, 0, every, code) + b"".join(words)

    @property
    def refused(self) -> int:
        """How many calls failed."""
        return int(struct.unpack_from("q", self._shared, 8)[0])

    @property
    def calls(self) -> list[str]:
        """CALL PATH, the path below the folder."""
        (count,) = struct.unpack_from("q", self._shared)
        assert count < _RECORDS
        records = (self._shared[_HEAD + _RECORD * n : _HEAD + _RECORD * (n + 1)] for n in range(count))
        return [record.partition(b"\0")[0].decode() for record in records]

    def users(self) -> list[str]:
        """The processes that are still counted."""
        found = []
        for maps in Path("/proc").glob("[0-9]*/maps"):
            with suppress(OSError):
                if maps.parent.name != str(os.getpid()) and self._name in maps.read_text():
                    found.append(maps.parent.name)
        return found


def pattern_of(call: str) -> str:
    """The calls like this one: whatever the numbers, hashes and temporary names in the path are."""
    found = re.sub(r"tmp[A-Za-z0-9_]{5,8}$", "tmp*", call)
    return re.sub(r"\*+", "*", re.sub(r"(?<![a-z])[0-9a-f]{8,}(?![a-z])|[0-9]+", "*", found))
