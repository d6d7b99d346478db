"""Checkpoints on disk: which there are, and whether they are whole. Loads no PyTorch: the walk asks, too."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from models.files import hash_of, read_text

HEAD = "checkpoint.json"
_NAME = re.compile(r"step-([0-9]{8}|[1-9][0-9]{8,})")


def checkpoints(folder: Path) -> list[Path]:
    """Those that were finished, oldest first; whether they still are whole, `damage` tells. A checkpoint gets its name
    when it is whole, so one without its head was harmed. Other names, as of somebody's copy, are let be."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a finished checkpoint, or None. Reads all of it."""
    try:
        head = read_head(checkpoint)
        with ThreadPoolExecutor() as threads:
            return next(filter(None, threads.map(lambda entry: _damage(checkpoint, entry), head["files"])), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"{HEAD} cannot be read ({type(problem).__name__})"


def _damage(checkpoint: Path, entry: Mapping[str, Any]) -> str | None:
    path = checkpoint / Path(entry["name"]).name
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.name} has {path.stat().st_size:,} bytes instead of {entry['bytes']:,}"
    with open(path, "rb") as handle:
        same = hashlib.file_digest(handle, "sha256").hexdigest() == entry["sha256"]
    return None if same else f"{path.name} was changed since it was written"


def read_head(checkpoint: Path) -> dict[str, Any]:
    """step, ranks, zero_stage, so_far, and the files by name, bytes and sha256. It carries its own hash."""
    head: dict[str, Any] = json.loads(read_text(checkpoint / HEAD))
    if head.pop("sha256") != hash_of(head):
        raise ValueError(f"{checkpoint / HEAD} was changed since it was written")
    return head
