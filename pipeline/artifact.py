"""A finished folder and its manifest: written aside, fsynced, renamed last.

A folder is complete under its final name, or was changed by somebody else: `look` and `altered` tell which. Imports
nothing heavy: the parent process reads artifacts through this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from models.errors import Refusal
from models.files import hash_of, read_text, remove, sync
from models.files import write_json as write_json  # callers take it from here

# What an artifact is, as `kind` in its manifest; pipeline/stages/stage.py says what each holds.
Makes = Literal["model", "answers", "signal", "exports", "results"]
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of a pruned model: which units it keeps
SCORES = "scores.safetensors"  # of a pruned model: the calibration statistics
PREPARED = "prepared.json"  # in a stage's work folder: what its ranks find, and what was counted of the text
METRICS = "metrics.jsonl"  # of a training: it holds timings
QUANTIZED = "quantized.safetensors"  # of a quantized model: its integers and scales
PLANNED_QUANTIZED = "quantized.json"  # of a model that is still to be quantized: its scheme and shapes
CARD = "README.md"  # of an export
BESIDE = (PLAN, SCORES, METRICS)  # they lie beside a model, and do not belong to it
_PARTIAL = ".partial"
_OLD = ".old"
_OWN_HASH = "own_sha256"  # in a JSON file: of all the rest of it
SEALS = ".seals.json"  # of a folder of intermediate files: what it holds
_SETTLED_NS = 2 * 10**9  # file systems stamp changes with a clock that may be that coarse


@dataclass(frozen=True)
class Found:
    """What stands where an artifact belongs, by names and sizes; `problem` names the file."""

    state: Literal["absent", "complete", "damaged", "unreadable"]
    manifest: dict[str, Any] | None = None  # of a complete or damaged one
    problem: str = ""


class Changed(ValueError):
    """A JSON file is not what was written."""


def with_hash(value: dict[str, Any]) -> dict[str, Any]:
    """As it is written: with a hash of itself, which `checked` looks at."""
    return {**value, _OWN_HASH: hash_of(value)}


def checked(value: Any) -> Any:
    """Without the hash. Raises Changed where it is another one; files of earlier versions have none."""
    if not isinstance(value, dict) or _OWN_HASH not in value:
        return value
    plain = {key: each for key, each in value.items() if key != _OWN_HASH}
    if value[_OWN_HASH] != hash_of(plain):
        raise Changed
    return plain


def publish(folder: Path, build: Callable[[Path], None], manifest: dict[str, Any]) -> dict[str, Any]:
    """Let `build` fill a folder aside, add manifest.json with every file's hash, and rename it to `folder`.

    An older folder of that name goes away only after the new one is complete on disk. Killed at any point, `folder`
    is the old one, the new one, or absent; never half of either.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}{_PARTIAL}"
    remove(aside)
    aside.mkdir()
    try:
        build(aside)
    except BaseException:  # a failed certificate leaves nothing behind
        shutil.rmtree(aside, ignore_errors=True)
        raise
    mask = os.umask(0o022)
    os.umask(mask)
    for path in _files(aside):  # some libraries write for the owner alone, and servers run as others
        path.chmod(0o666 & ~mask)
    files = {str(p.relative_to(aside)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in _files(aside)}
    manifest = {
        **manifest,
        "files": files,
        "content_hash": _combine({n: e for n, e in files.items() if not _beside(n)}),
    }
    write_json(aside / MANIFEST, with_hash(manifest))
    for path in [*_files(aside), *(p for p in aside.rglob("*") if p.is_dir()), aside]:
        sync(path)
    if os.path.lexists(folder):
        if others := foreign(folder):
            raise Refusal(f"{folder / others[0]} is not Retort's, and would be lost; move it away")
        old = folder.parent / f".{folder.name}{_OLD}"
        remove(old)
        os.rename(folder, old)
        os.rename(aside, folder)
        remove(old)
    else:
        os.rename(aside, folder)
    sync(folder.parent)
    return manifest


def look(folder: Path) -> Found:
    """Whether a finished artifact stands at `folder`. Its hashes are left to `altered`."""
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        manifest = checked(manifest)
        problem = _malformed(manifest)
    except (FileNotFoundError, NotADirectoryError):
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return Found("absent")
        return Found("unreadable", problem="it has no manifest.json, so Retort did not make it, or it lost a file")
    except OSError as failure:
        return Found("unreadable", problem=f"its manifest.json: {failure.strerror}")
    except Changed:
        return Found("unreadable", problem="its manifest.json was changed since it was written")
    except (ValueError, RecursionError):
        return Found("unreadable", problem="its manifest.json is not JSON")
    if problem:
        return Found("unreadable", problem=problem)
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return Found("damaged", manifest, f"{name} is missing")
        except OSError as failure:
            return Found("unreadable", problem=f"its {name}: {failure.strerror}")
        if size != entry["bytes"]:
            return Found("damaged", manifest, f"{name} has {size:,} bytes instead of {entry['bytes']:,}")
    return Found("complete", manifest)


def _malformed(manifest: Any) -> str:
    """What is wrong with a manifest.json, or nothing."""
    kinds = {"stage": str, "kind": str, "files": dict, "content_hash": str, "parents": dict, "config": dict}
    for key, kind in kinds.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(key), kind):
            return f"its manifest.json is not Retort's: it has no {key}"
    if manifest["kind"] not in get_args(Makes):
        return f"its manifest.json is not Retort's: its kind is {manifest['kind']}"
    for name, entry in manifest["files"].items():
        path = PurePosixPath(name)
        sized = isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        if path.is_absolute() or ".." in path.parts or not sized:
            return f"its manifest.json names the file {name} in a way that Retort does not"
    if any(not isinstance(parent, dict) or "path" not in parent for parent in manifest["parents"].values()):
        return "its manifest.json names a parent in a way that Retort does not"
    return ""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None where none stands at `folder`."""
    found = look(folder)
    return found.manifest if found.state == "complete" else None


def altered(folder: Path, manifest: dict[str, Any], cache: Path | None = None) -> list[str]:
    """The files of an artifact that its manifest does not know as they are, those that came and went included."""
    told = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    found = _hashes(folder, cache)
    found.pop(MANIFEST, None)
    changed = sorted(name for name in told.keys() | found.keys() if told.get(name) != found.get(name))
    return altered(folder, manifest) if changed and cache is not None else changed  # the cache might be what is wrong


def seal(
    folder: Path, known: Mapping[str, str] | None = None, becomes: Path | None = None, unchanged: Collection[str] = ()
) -> None:
    """Write down what a folder of intermediate files holds, so that `sealed` can tell when that changed. `known`: name
    → sha256 of files that were hashed while they were written. `becomes`: the name that the folder gets next, under
    which `sealed` need not read it again; of the known files, those that are `unchanged` since they were hashed."""
    known = known or {}
    told, fresh = {}, {}
    for path in _files(folder):
        name, now, stamp = str(path.relative_to(folder)), time.time_ns(), _stamp(path)
        told[name] = known.get(name) or _sha256(path)
        if becomes is not None and _settled(stamp, now) and (name not in known or name in unchanged):
            fresh[str(becomes.resolve() / name)] = [stamp, told[name]]
    write_json(folder / SEALS, told)
    if becomes is not None:
        keep(_cache_of(becomes), fresh)


def sealed(folder: Path) -> bool:
    """Whether a folder holds what it was sealed with. Files are read again only when their size or times changed."""
    told = _remembered_json(folder / SEALS)
    return bool(told) and told == _hashes(folder, _cache_of(folder))


def _cache_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.hashes.json")


def foreign(folder: Path) -> list[str]:
    """What lies in `folder` and is no file of its artifact: it must not be lost with it."""
    if folder.is_symlink():
        return []  # the link alone would go
    known = {MANIFEST, *((look(folder).manifest or {}).get("files") or {})}
    return sorted(
        name for p in folder.rglob("*") if not p.is_dir() and (name := str(p.relative_to(folder))) not in known
    )


def quantized_file(folder: Path) -> Path | None:
    """The integers that a model's weights are made of, where it is quantized."""
    if (folder / "grid.safetensors").is_file():
        raise Refusal(
            f"{folder}: it was quantized by a version before 0.2 (grid.safetensors); run the stage quantize again"
        )
    return folder / QUANTIZED if (folder / QUANTIZED).is_file() else None


def exports_of(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Folder → its figures, of an artifact that holds exports; of one without figures there are none."""
    figures: dict[str, dict[str, Any]] = (manifest.get("metrics") or {}).get("formats") or {}
    folders = dict.fromkeys(name.partition("/")[0] for name in manifest["files"] if "/" in name)
    ordered = [name for name in figures if name in folders]
    return {folder: figures.get(folder, {}) for folder in dict.fromkeys([*ordered, *folders])}


def content_hash(path: Path, cache: Path | None = None) -> str:
    """sha256 over the names and contents of a model folder's (or a file's) files, manifest and metrics left out.

    `cache`: as of `_hashes`.
    """
    found = _hashes(path, cache)
    files = {n: {"sha256": h} for n, h in found.items() if path.is_file() or not (n == MANIFEST or _beside(n))}
    if not files:
        raise Refusal(f"{path} holds no files; give a model folder, a data file or a hub id")
    return _combine(files)


def _hashes(path: Path, cache: Path | None) -> dict[str, str]:
    """Name → sha256 of a folder's files, or of the one file.

    `cache` is a JSON file that remembers hashes by size, times and inode, so that a 13 GB teacher is read once, not at
    every rerun. A file that has just been written, or will have been by a clock that was set back, is not remembered:
    another change might leave the same times.
    """
    known = remembered(cache)
    fresh = dict(known)
    found = {}
    for p in [path] if path.is_file() else _files(path):
        found[p.name if path.is_file() else str(p.relative_to(path))] = known_hash(p, fresh)
    if cache is not None and fresh != known:
        keep(cache, fresh)
    return found


def known_hash(path: Path, known: dict[str, Any]) -> str:
    """The sha256 of a file, by what a cache knows; what it does not is read, and then known."""
    key, stamp, now = os.path.realpath(path), _stamp(path), time.time_ns()
    before = known.pop(key, None)
    digest: str = before[1] if before and before[0] == stamp else _sha256(path)
    if _settled(stamp, now):
        known[key] = [stamp, digest]
    return digest


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _settled(stamp: list[int], now: int) -> bool:
    return max(stamp[1:3]) < now - _SETTLED_NS


def keep(cache: Path, known: dict[str, Any]) -> None:
    with suppress(OSError):  # without it files are read once more, which is no reason to end a run
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, with_hash(known))


def remembered(cache: Path | None) -> dict[str, Any]:
    """A cache that is missing, was damaged, or has no hash of itself, remembers nothing: one wrong digit in it would
    be believed instead of a file."""
    known = _remembered_json(cache) if cache is not None else {}
    try:
        return checked(known) if _OWN_HASH in known else {}
    except Changed:
        return {}


def _remembered_json(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def _beside(name: str) -> bool:
    """Whether a file of an artifact does not belong to the model. An adapter is merged, and its files name its folder;
    the manifest of an export and its card hold timings."""
    return name in BESIDE or name.startswith("adapter/") or name.endswith((f"/{MANIFEST}", f"/{CARD}"))


def sweep(run_dir: Path, names: Collection[str]) -> None:
    """Remove what a killed process left half written of the artifacts `names`, and of nothing else."""
    for name in names:
        remove(run_dir / f".{name}{_PARTIAL}")
        shutil.rmtree(cleared(run_dir / "work" / name), ignore_errors=True)
        old, folder = run_dir / f".{name}{_OLD}", run_dir / name
        if os.path.lexists(folder):
            remove(old)
        elif os.path.lexists(old):  # killed between the two renames: the old one is still the truth
            os.rename(old, folder)


def cleared(work: Path) -> Path:
    """The name under which a stage's work folder is removed."""
    return work.with_name(f".{work.name}{_OLD}")


def _files(folder: Path) -> list[Path]:
    return sorted(
        p
        for p in folder.rglob("*")
        if p.is_file() and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _combine(files: dict[str, dict[str, Any]]) -> str:
    lines = "".join(f"{entry['sha256']}  {name}\n" for name, entry in sorted(files.items()))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()
