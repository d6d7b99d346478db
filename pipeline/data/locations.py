"""Where text lies: what the values of data.train, data.validation and data.test name.

A value is one of these, or a list of them:

    stdlib          the embedded corpus: the language reference and the standard library's docstrings
    ciphers         an embedded corpus of puzzles, which earlier lines of a document solve (pipeline/data/ciphers.py);
                    ciphers:noisy has wrong letters in it
    FILE            .txt, .jsonl, .json (an array of objects, or one object a line) or .parquet
    FOLDER          all such files in it and below, of one kind
    OWNER/NAME      a hub dataset, read at the split named like the field; OWNER/NAME:SPLIT chooses another
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Refusal

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
EMBEDDED = ("stdlib", "ciphers")


@dataclass(frozen=True)
class Location:
    """One place, found. `files` is empty for the embedded corpora and for hub datasets."""

    label: str  # as messages call it: data.train=corpus.jsonl
    name: str
    kind: str  # "stdlib", "ciphers", "files" or "hub"
    files: tuple[Path, ...] = ()
    hub_split: str = ""


def locate(split: str, given: Any) -> list[Location]:
    """What `given`, a value of data.SPLIT, names: a word, a path, a hub id, or a list of them."""
    if given is None or given == "???":  # OmegaConf's mark for a value that the user must give
        return []
    names = [given] if isinstance(given, str | os.PathLike) else given
    return [find(split, str(name)) for name in names]


def find(split: str, name: str) -> Location:
    label = f"data.{split}={name}"
    path = Path(name).expanduser()
    if name == "stdlib":
        return Location(label, name, "stdlib")
    if name in ("ciphers", "ciphers:noisy"):
        return Location(label, name, "ciphers")
    if path.is_dir():
        return Location(label, name, "files", _files_in(path, label))
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise Refusal(f"{label}: cannot read this kind of file; give one of {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise Refusal(f"{label}: the file is empty; give one with text in it")
        return Location(label, name, "files", (path,))
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", name)
    # A relative path looks like a hub id too; it is a path if its suffix is known or its first folder exists.
    if hub and path.suffix not in SUFFIXES and not Path(path.parts[0]).is_dir():
        return Location(label, hub[1], "hub", hub_split=hub[2] or split)
    raise Refusal(
        f"{label}: no such file or folder, nor is it a hub dataset id (OWNER/NAME) or the word stdlib or ciphers"
    )


def _files_in(folder: Path, label: str) -> tuple[Path, ...]:
    inside = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    visible = (path for path in inside if not any(part[0] == "." for part in path.relative_to(folder).parts))
    files = sorted(path for path in visible if path.stat().st_size)
    if not files:
        raise Refusal(f"{label}: the folder holds no {', '.join(SUFFIXES)} file with text in it")
    kinds = sorted({path.suffix.replace("jsonl", "json") for path in files})
    if len(kinds) > 1:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise Refusal(f"{label}: the folder mixes {' and '.join(kinds)} files; name what to read, as {largest}")
    return tuple(files)
