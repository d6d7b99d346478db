"""A run folder: whose it is, what stands in it, and one command at a time.

Retort removes and renames only what it made. It knows its folders by a marker, and of what they hold the names of the
run's stages, and `.NAME.partial` and `.NAME.old` beside each, which are its own whatever they hold; everything else is
let be, or refused. Loads no torch.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline import artifact

MARKER = "retort.json"
PLANNED = "work/plan.json"  # the stages of the last whole plan
LOCK = ".lock"
SIGNALS, ANSWERS = "signals", "answers"  # in work: what record and generate have finished of an unfinished stage
_MADE = {
    "config.json",
    "report.json",
    "report.md",
    "report.html",
    "work",
    "logs",
    "jobs",
}  # by runs; a marker is beside them
SCRATCH = "retort-check-"  # how what commands leave in the temporary folder begins
_RANDOM = "[a-z0-9_]{8}"  # how Python's tempfile ends a name
_SCRATCH_NAME = re.compile(
    rf"{SCRATCH}({_RANDOM}|[0-9a-f]{{32}}-\d+)"
)  # the latter: that a rank has told why it failed
_SCRATCH_HOLDS = re.compile(rf"spec\.json|\.spec\.json\.partial|tmp{_RANDOM}")  # a configuration; plans
_YOUNG_SECONDS = 60
_OWN = {MARKER, f".{MARKER}.partial", LOCK, "multirun.yaml"}  # the last is Hydra's, where a sweep has one run


def check_ours(run_dir: Path) -> None:
    """Refuse a folder that holds other things. One that is not there yet, is empty, was marked, or holds artifacts
    alone, as copied from other runs, may become a run folder."""
    try:
        names = {p.name for p in run_dir.iterdir()}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise Refusal(f"run_dir={run_dir}: a file of that name is in the way; choose another run_dir") from None
    if MARKER in names:
        return
    for name in sorted(names - _OWN, key=lambda name: (name in _MADE, name)):
        if artifact.look(run_dir / name).manifest is None:
            raise Refusal(
                f"run_dir={run_dir}: it holds other things ({name}) and no {MARKER}, which marks a run folder; choose "
                f"another run_dir, or put an empty {MARKER} into it if it is one"
            )


@contextmanager
def claimed(run_dir: Path) -> Iterator[int]:
    """Make and mark the folder, and keep other commands out of it: two would overwrite each other's checkpoints.

    Yields the lock's descriptor. Whoever holds it open keeps the folder locked.
    """
    check_ours(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    handle = _opened(run_dir / LOCK)
    try:
        _lock(handle, run_dir)
        mark(run_dir)
        yield handle
    finally:
        os.close(handle)


def busy(run_dir: Path) -> bool:
    """Whether a command works in the run folder, on this machine or where locks travel."""
    try:
        handle = os.open(run_dir / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def mark(run_dir: Path) -> None:
    """Also of a folder that several jobs begin at once: the marker counts by being there."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError), (run_dir / MARKER).open("x") as file:
        file.write(json.dumps({"run_folder_of": "retort"}, indent=2) + "\n")


def _lock(handle: int, run_dir: Path) -> None:
    for wait in (0.2, 0.3, 0.5, 0.0):  # who only looks whether it is locked (status) has it for a moment
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(wait)
        except OSError:
            return  # some cluster file systems have no locks
    raise Refusal(f"run_dir={run_dir}: another command is working in it; wait for it or choose another run_dir")


def _opened(lock: Path) -> int:
    """Made where it is not there, and not emptied. No link is followed: it might lead to somebody's file."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(mode := lock.lstat().st_mode):
            what = "a link" if stat.S_ISLNK(mode) else "a folder" if stat.S_ISDIR(mode) else "no ordinary file"
            raise Refusal(f"{lock} is {what}, which Retort did not make; remove it")
    return os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def check_whole(config: dict[str, Any]) -> None:
    """Refuse a run folder in which an artifact was damaged, is unreadable or is not Retort's: nothing is made of it,
    and it is not made again in silence. Every finished stage is looked at, since the report tells of all."""
    run_dir = Path(config["run_dir"])
    others = {path.parent.name for path in run_dir.glob(f"*/{artifact.MANIFEST}")}
    for name in [*config["stages"], *sorted(others - config["stages"].keys())]:
        folder = run_dir / name
        found = artifact.look(folder)
        if found.state == "absent" and os.path.lexists(left := run_dir / f".{name}.old"):
            found = artifact.look(left)  # the sweep will put it back
        if found.manifest is not None and found.manifest["stage"] != name:
            raise Refusal(f"{folder}: it is the artifact of a stage {found.manifest['stage']}; move it away")
        if found.state == "unreadable":
            raise Refusal(f"{folder}: {found.problem}; restore it, or move it away to have the stage run again")
        if name not in config["force"]:
            check_unchanged(folder, found, run_dir, f"add force=[{name}] to make it again")


def check_unchanged(folder: Path, found: artifact.Found, run_dir: Path, remedy: str) -> None:
    """Refuse an artifact whose files are not those of its manifest."""
    if found.manifest is None:
        return
    problem = found.problem
    if not problem and (others := artifact.foreign(folder)):
        raise Refusal(f"{folder / others[0]} is not of the artifact that lies there; move it away")
    if not problem and (names := artifact.altered(folder, found.manifest, hashes(run_dir))):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        known, there = names[0] in found.manifest["files"], (folder / names[0]).exists()
        what = "was changed since it was made" if known and there else "is missing" if known else "was added to it"
        problem = f"{names[0]}{more} {what}"
    if problem:
        raise Refusal(f"{folder} is damaged: {problem}; restore it, or {remedy}")


def note_plan(run_dir: Path, stages: Sequence[str]) -> None:
    """For who asks what is still to do."""
    (run_dir / "work").mkdir(exist_ok=True)
    artifact.write_json(run_dir / PLANNED, {"stages": [*stages]})


def clear(run_dir: Path, stage: str) -> None:
    """Remove the work folder of a stage. Under another name, so that where this is cut short what is left does not pass
    for an unfinished stage that lost files."""
    work = run_dir / "work" / stage
    aside = artifact.cleared(work)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.rename(work, aside)
    except FileNotFoundError:
        return
    except OSError:  # no new name is to be had on a full disk
        aside = work
    shutil.rmtree(aside, ignore_errors=True)


def hashes(run_dir: Path) -> Path | None:
    """The cache of the hashes of what the stages read; none before the folder is a run folder."""
    return run_dir / "work" / "hashes.json" if (run_dir / MARKER).exists() else None


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder for what need not outlive the command. Those that killed commands left are removed."""
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{SCRATCH}*"):
        if not _SCRATCH_NAME.fullmatch(left.name):
            continue
        with suppress(OSError), _locked(left):  # whoever works in it holds the lock
            old = time.time() - left.stat().st_mtime > _YOUNG_SECONDS  # or is about to take it
            if old and all(_SCRATCH_HOLDS.fullmatch(name) for name in os.listdir(left)):
                shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=SCRATCH) as made, _locked(Path(made)):
        yield Path(made)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Raises OSError where somebody else holds the folder."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
