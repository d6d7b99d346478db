"""A stage that several jobs share out (`share=I/N`). Each works in a run folder of its own, below that of the run:

    <run_dir>/work/shares/<stage>/<I>-of-<N>

and makes there what the stage would, of its part of the text. The stage itself, without `share`, takes over what they
have made, makes what is missing, and removes their folders; their logs it keeps. Loads no torch.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline import artifact, hashes, run_folder
from pipeline.config import selected, share

_NAME = re.compile(r"(\d+)-of-(\d+)")


def alone(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a job's share: the run folder is its own, and all else is where it was."""
    given, stages = config["share"], selected(config)
    if len(stages) > 1:
        raise Refusal(f"share={given}: it is of one stage; add only=[STAGE], one of {', '.join(stages)}")
    asked = share(given)
    assert asked is not None
    run_dir = Path(config["run_dir"])
    run_folder.check_ours(run_dir)
    folder = run_dir / "work" / "shares" / stages[0] / f"{asked[0]}-of-{asked[1]}"
    return {**config, "run_dir": str(folder)}


def begin(run_dir: Path) -> None:
    """Make the folder of a share. What the run knows of the text's and the parents' hashes is known there, too: it may
    take hours to find out."""
    run_folder.mark(whole(run_dir))
    run_folder.mark(run_dir)
    (run_dir / "work").mkdir(exist_ok=True)
    known = artifact.remembered(run_folder.hashes(whole(run_dir)))
    if known and not artifact.remembered(run_folder.hashes(run_dir)):
        hashes.add(run_folder.hashes(run_dir), known)


def whole(run_dir: Path) -> Path:
    """The folder of the run whose share is made in `run_dir`."""
    return run_dir.parents[3]


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
    if not (found := folders(run_dir, stage)):
        return None
    made = sum(artifact.read_manifest(folder / stage) is not None for folder in found)
    return made, max(int(folder.name.split("-")[2]) for folder in found)


def made(run_dir: Path, stage: str, *, forced: bool, but: Path | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The artifacts of a stage's shares, each with its manifest. `forced`: those alone that were made by force, as who
    forces a stage wants nothing that was there before. `but`: for the share made in that folder, and then of another
    number of shares: the others of its own number have other parts."""
    for folder in folders(run_dir, stage):
        if but is not None and folder.name.split("-")[2] == but.name.split("-")[2]:
            continue
        manifest = artifact.read_manifest(folder / stage)
        if manifest is not None and (not forced or stage in manifest["run_config"]["force"]):
            yield folder / stage, manifest


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
