"""What the processes of a stage say, kept in the run folder: a log for each rank of each start, and why one failed.

    <run_dir>/logs/<stage>/start-<n>/rank-<r>.log         what Python wrote on rank r, beside where it went anyway
                                    /rank-<r>.error.json  which stage, host, rank, where, and what it said
                                    /error.json           that of the rank that failed first, or what its parent knows

Loads no torch.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO, cast

from models.files import remove, write_json
from pipeline.launch import ROOT

VARIABLE = "RETORT_LOGS"  # tells the processes of a start where their logs belong
_START = re.compile(r"start-(\d+)")


def next_start(run_dir: Path, stage: str) -> Path:
    """The folder of a new start of a stage, made."""
    folder = run_dir / "logs" / stage / f"start-{len(starts(run_dir, stage))}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def starts(run_dir: Path, stage: str) -> list[Path]:
    """The folders of a stage's starts, oldest first."""
    found = {
        int(m[1]): path for path in (run_dir / "logs" / stage).glob("start-*") if (m := _START.fullmatch(path.name))
    }
    return [found[number] for number in sorted(found)]


class _Both:
    """A stream whose text goes to a file too. A file that cannot be written to is let be."""

    def __init__(self, stream: TextIO, file: TextIO) -> None:
        self._stream, self._file = stream, file

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):
            self._file.write(text)
        return self._stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._file.flush()
        self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def keep(rank: int) -> None:
    """From here on in this process, which is a rank. What a terminal shows, with its progress bar, is not kept."""
    if (folder := os.environ.get(VARIABLE)) is None:
        return
    path = Path(folder) / f"rank-{rank:05d}.log"
    try:
        if path.is_symlink():
            remove(path)
        file = path.open("a", encoding="utf-8", buffering=1)
    except OSError:
        return
    if not sys.stdout.isatty():
        sys.stdout = cast(TextIO, _Both(sys.stdout, file))
    sys.stderr = cast(TextIO, _Both(sys.stderr, file))
    with suppress(RuntimeError, ValueError, OSError):
        faulthandler.enable(file)  # a crash below Python, too


def failed(stage: str, rank: int, status: int, message: str, problem: BaseException | None = None) -> None:
    """This rank has failed, and ends with `status`."""
    told = {"stage": stage, "rank": rank, "status": status, "where": _where(problem), "message": message}
    tell(told | {"traceback": _trace(problem)}, f"rank-{rank:05d}.error.json")


def tell(told: dict[str, Any], name: str, folder: str | None = None) -> None:
    """Of a failure, in a file of its own, with what is known of this process."""
    if (folder := folder or os.environ.get(VARIABLE)) is None:
        return
    here = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID"),
        "time": time.time(),
    }
    with suppress(OSError):
        write_json(Path(folder) / name, here | told)


def collect(folder: Path, stage: str, status: int, ended: Path) -> None:
    """By the parent, of a start that has failed: what the first rank to fail said, or that nobody said anything.
    `ended`: where the watchdog says which rank it waited for."""
    found = [_read(path) for path in [*folder.glob("rank-*.error.json"), ended]]
    told = min((each for each in found if each), key=lambda each: each["time"], default=None)
    if told is None:
        by = f"signal {-status}" if status < 0 else f"exit status {status}"
        said = {
            130: "interrupted; the same command goes on",
            -9: "killed (signal 9), as a system does that is out of memory; dmesg says so",
        }
        told = {
            "stage": stage,
            "rank": None,
            "status": status,
            "where": None,
            "message": said.get(status, f"ended with {by}, unsaid why"),
        }
        tell(told, "error.json", str(folder))
    else:
        with suppress(OSError):
            write_json(folder / "error.json", {"stage": stage, "status": status} | told)


def last_error(run_dir: Path, stage: str) -> dict[str, Any] | None:
    """Of the last start of a stage, where that failed."""
    found = starts(run_dir, stage)
    return _read(found[-1] / "error.json") if found else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return told if isinstance(told, dict) and isinstance(told.get("time"), int | float) else None
    except (OSError, ValueError, RecursionError):
        return None


def _where(problem: BaseException | None) -> str | None:
    """File, line and function of the innermost frame of this project's."""
    frames = traceback.extract_tb(problem.__traceback__) if problem is not None else []
    own = [frame for frame in frames if frame.filename.startswith(ROOT + "/") and "/.venv/" not in frame.filename]
    if not (frames := own or list(frames)):
        return None
    return f"{frames[-1].filename.removeprefix(ROOT + '/')}:{frames[-1].lineno} in {frames[-1].name}"


def _trace(problem: BaseException | None) -> list[str]:
    return [] if problem is None else "".join(traceback.format_exception(problem)).splitlines()
