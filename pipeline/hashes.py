"""The hashes of files of text: each is read once, however many stages ask. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import artifact

_known: dict[str, Any] = {}  # of this process, as a cache of pipeline/artifact.py has them
_cache: Path | None = None


def file_hashes(paths: Iterable[Path]) -> list[str]:
    """sha256 of each file; it is read again only where its size, times or inode have changed."""
    before = dict(_known)
    found = [artifact.known_hash(path, _known) for path in paths]
    if _known != before:
        add(_cache, _known)
    return found


def remember_in(cache: Path | None) -> None:
    """From here on what the cache holds is known, and added to; None: this process alone remembers."""
    global _cache
    _cache = cache
    _known.update(artifact.remembered(cache))


def known() -> dict[str, Any]:
    """What another process may `add` to a cache."""
    return dict(_known)


def add(cache: Path | None, hashes: Mapping[str, Any]) -> None:
    if cache is not None and (kept := artifact.remembered(cache)) | dict(hashes) != kept:
        artifact.keep(cache, kept | dict(hashes))
