"""A stage that several jobs share out (`share=I/N`). Each works in a run folder of its own, below that of the run:

    <run_dir>/work/shares/<stage>/<I>-of-<N>

and makes there what the stage would, of its part of the text. The stage itself, without `share`, takes over what they
have made, finished or not, makes what is missing, and removes their folders; their logs it keeps. Loads no torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.files import read_text
from pipeline import artifact, hashes, run_folder
from pipeline.config import selected, share

_NAME = re.compile(r"(\d+)-of-(\d+)")


def alone(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a job's share: the run folder is its own, and all else is where it was."""
    given, stages = config["share"], selected(config)
    if len(stages) > 1:
        raise Refusal(f"share={given}: it is of one stage, record or generate; add only=[STAGE]")
    asked = share(given)
    assert asked is not None
    run_dir = Path(config["run_dir"])
    run_folder.check_ours(run_dir)
    if run_folder.busy(run_dir):
        raise Refusal(f"run_dir={run_dir}: another command is working in it; a share is made before, or after it")
    folder = run_dir / "work" / "shares" / stages[0] / f"{asked[0]}-of-{asked[1]}"
    return {**config, "run_dir": str(folder)}


def begin(run_dir: Path) -> None:
    """Make the folder of a share. What the run knows of the hashes of files is known there, too: it may take hours to
    find out."""
    run_folder.mark(whole(run_dir))
    run_folder.mark(run_dir)
    (run_dir / "work").mkdir(exist_ok=True)
    known = artifact.remembered(run_folder.hashes(whole(run_dir)))
    if known and not artifact.remembered(run_folder.hashes(run_dir)):
        hashes.add(run_folder.hashes(run_dir), known)


def whole(run_dir: Path) -> Path:
    """The folder of the run whose share is made in `run_dir`."""
    return run_dir.parents[3]


def root(config: dict[str, Any]) -> Path:
    """The run's folder, also where a share of it is made."""
    run_dir = Path(config["run_dir"])
    return run_dir if config.get("share") is None else whole(run_dir)


def folders(run_dir: Path, stage: str) -> list[Path]:
    """Those of a stage's shares, in order."""
    found = [
        (int(m[2]), int(m[1]), path)
        for path in (run_dir / "work" / "shares" / stage).glob("*-of-*")
        if (m := _NAME.fullmatch(path.name))
    ]
    return [path for *_, path in sorted(found)]


def finished(run_dir: Path, stage: str) -> tuple[int, int] | None:
    """How many of a stage's shares are, and how many there are to be; None where it was not shared out."""
    if not (found := _last(run_dir, stage)):
        return None
    return len(found) - len(unfinished(run_dir, stage)), _number(found[0])


def unfinished(run_dir: Path, stage: str) -> list[Path]:
    """The folders of those that were begun, and are not finished."""
    return [folder for folder in _last(run_dir, stage) if artifact.read_manifest(folder / stage) is None]


def _last(run_dir: Path, stage: str) -> list[Path]:
    """Where a stage was shared out in several numbers, those of the number that was begun last."""
    found = folders(run_dir, stage)
    newest = max(found, key=lambda folder: (folder / run_folder.MARKER).stat().st_mtime, default=None)
    return [folder for folder in found if newest is not None and _number(folder) == _number(newest)]


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[2])


@dataclass(frozen=True)
class Made:
    """By another job, of the same stage: an artifact, or what an unfinished one has on its shelf."""

    folder: Path
    manifest: dict[str, Any] | None


def made(run_dir: Path, stage: str, *, forced: bool, by: Path | None = None) -> Iterator[Made]:
    """What the stage may take over, or the share of it that is made in `by`. `forced`: only what was made by force, as
    who forces a stage wants nothing that was there before."""
    others = [] if by is None or forced else [run_dir]
    for folder in folders(run_dir, stage):
        if by is not None and _number(folder) == _number(by):
            continue  # itself, and the others of its number, which have other parts
        if not forced or stage in _forced(folder):
            others.append(folder)
    for folder in others:
        if (manifest := artifact.read_manifest(folder / stage)) is not None:
            yield Made(folder / stage, manifest)
        shelf = folder / "work" / run_folder.SIGNALS / stage
        yield from (Made(part, None) for part in sorted(shelf.glob("*")) if part.is_dir())
        if (shelf := folder / "work" / run_folder.ANSWERS / stage).is_dir():
            yield Made(shelf, None)


def _forced(folder: Path) -> list[str]:
    try:
        return list(json.loads(read_text(folder / "config.json"))["force"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def refuse_busy(run_dir: Path, stage: str) -> None:
    """While jobs make shares of it: what they have not finished would be made twice."""
    if busy := [folder.name for folder in folders(run_dir, stage) if run_folder.busy(folder)]:
        told = ", ".join(f"share={name.replace('-of-', '/')}" for name in busy)
        raise Refusal(f"{stage}: jobs with {told} are working on it; run the same command again when they have ended")


def clear(run_dir: Path, stage: str) -> None:
    """Once the stage is finished. The logs of its shares go to its own."""
    for folder in folders(run_dir, stage):
        if run_folder.busy(folder):
            continue  # a job that came too late
        logs = run_dir / "logs" / stage / f"share-{folder.name}"
        shutil.rmtree(logs, ignore_errors=True)
        with suppress(OSError):  # none were written
            os.renames(folder / "logs" / stage, logs)
        shutil.rmtree(folder, ignore_errors=True)
