"""A finished folder and its manifest: written aside, fsynced, renamed last.

A folder under its final name is complete by construction; anything else is a leftover and is removed. Imports nothing
heavy: the parent process reads artifacts through this module.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from models.errors import Refusal

# What an artifact is, as `kind` in its manifest; pipeline/stages/stage.py says what each holds.
Makes = Literal["model", "answers", "signal", "exports", "results"]
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of a pruned model: which units it keeps
SCORES = "scores.safetensors"  # of a pruned model: the calibration statistics
METRICS = "metrics.jsonl"  # of a training: it holds timings
QUANTIZED = "quantized.safetensors"  # of a quantized model: its integers and scales
PLANNED_QUANTIZED = "quantized.json"  # of a model that is still to be quantized: its scheme and shapes
CARD = "README.md"  # of an export
BESIDE = (PLAN, SCORES, METRICS)  # they lie beside a model, and do not belong to it
_PARTIAL = ".partial"


def publish(folder: Path, build: Callable[[Path], None], manifest: dict[str, Any]) -> dict[str, Any]:
    """Let `build` fill a folder aside, add manifest.json with every file's hash, and rename it to `folder`.

    An older folder of that name goes away only after the new one is complete on disk. Killed at any point, `folder`
    is the old one, the new one, or absent; never half of either.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.parent / f".{folder.name}{_PARTIAL}"
    shutil.rmtree(aside, ignore_errors=True)
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
    write_json(aside / MANIFEST, manifest)
    for path in [*_files(aside), *(p for p in aside.rglob("*") if p.is_dir()), aside]:
        _fsync(path)
    if folder.exists():
        old = folder.parent / f".{folder.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
        os.rename(aside, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(aside, folder)
    _fsync(folder.parent)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished artifact, or None when `folder` is none or some of its files are missing."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        whole = all((folder / name).stat().st_size == entry["bytes"] for name, entry in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if whole else None


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

    `cache` is a JSON file that remembers hashes by (size, mtime), so that a 13 GB teacher is read once, not at every
    rerun.
    """
    known: dict[str, Any] = {}
    if cache is not None and cache.exists():
        try:
            known = json.loads(cache.read_text())
        except ValueError:
            known = {}
    fresh = dict(known)
    files = {}
    for p in [path] if path.is_file() else _files(path):
        name = p.name if path.is_file() else str(p.relative_to(path))
        if p != path and (name == MANIFEST or _beside(name)):
            continue
        stat = p.stat()
        key, stamp = str(p.resolve()), [stat.st_size, stat.st_mtime_ns]
        if known.get(key, [None])[0] != stamp:
            fresh[key] = [stamp, _sha256(p)]
        files[name] = {"sha256": fresh[key][1]}
    if not files:
        raise Refusal(f"{path} holds no files; give a model folder, a data file or a hub id")
    if cache is not None and fresh != known:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, fresh)
    return _combine(files)


def _beside(name: str) -> bool:
    """Whether a file of an artifact does not belong to the model. An adapter is merged, and its files name its folder;
    the manifest of an export and its card hold timings."""
    return name in BESIDE or name.startswith("adapter/") or name.endswith((f"/{MANIFEST}", f"/{CARD}"))


def write_json(path: Path, value: Any) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}{_PARTIAL}")
    aside.write_text(json.dumps(value, indent=2, sort_keys=False) + "\n")
    _fsync(aside)
    os.replace(aside, path)


def sweep(run_dir: Path) -> None:
    """Remove what a killed process left half written."""
    for leftover in run_dir.glob(f".*{_PARTIAL}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    for old in run_dir.glob(".*.old"):  # the folder it stood for may be missing: then the old one is still the truth
        name = run_dir / old.name[1 : -len(".old")]
        if name.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, name)


def versions() -> dict[str, str]:
    """Versions of the libraries that decide the numbers."""
    from importlib import metadata

    found = {}
    for name in (
        "torch",
        "pytorch-lightning",
        "transformers",
        "tokenizers",
        "datasets",
        "deepspeed",
        "numpy",
        "safetensors",
        "hydra-core",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` when files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    try:
        out = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


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


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
