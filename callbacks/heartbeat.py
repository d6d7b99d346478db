"""Ranks that watch each other through files: who has stopped is named, and the job is ended.

A rank that is stopped, swapped out or on a node that is gone leaves the others waiting in a collective, where they can
say nothing; and not every process group has a timeout (DeepSpeed's own ones have none). So each rank has a thread that
writes where it is, and reads what the others write. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from models.files import remove, write_json

ENDED = "ended.json"  # which rank a job was ended for
_ASLEEP = 5  # times the beat's length
_LAST_WORDS = 3  # beats: so much later than the others the one that speaks may find out that none gets on
_ROOT = str(Path(__file__).resolve().parent.parent)


@dataclass
class _Seen:
    """What is known of a rank, by this rank's own clock: those of other machines may differ."""

    told: dict[str, Any]
    heard: float  # when it last wrote
    moved: float  # when its progress last changed


class Heartbeat:
    """Writes `<folder>/rank-00001.json` and reads those of the others, until it is stopped.

    `silent_seconds`: after so long without progress a rank is named, once for each time. `timeout_seconds`: after so
    long this process ends, and with it the job; as long as any rank gets on, the job does. Of the two, the shorter time
    is that of the names, so that a job never ends without one. `progress` is counted up, by one with each `unit`, from
    outside.
    """

    def __init__(
        self,
        stage: str,
        folder: Path,
        rank: int,
        world: int,
        silent_seconds: float,
        timeout_seconds: float,
        unit: str = "micro-batch",
    ) -> None:
        self.stage, self.folder, self.rank, self.world = stage, folder, rank, world
        self.silent_seconds, self.timeout_seconds = min(silent_seconds, timeout_seconds), timeout_seconds
        self.unit, self.progress = unit, 0
        self.step: int | None = None  # of the training; None where there are no steps
        self._main = threading.main_thread().ident
        self._over = threading.Event()
        self._named: dict[int, int] = {}  # rank → the progress at which it was named
        self._seen: dict[int, _Seen] = {}
        self._every = min(5.0, silent_seconds / 4, timeout_seconds / 4)
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._thread.start()

    @staticmethod
    def clear(folder: Path) -> None:
        """Of an earlier start; by one rank, before any starts: the processes that it names may be others by now."""
        for path in (*folder.glob("rank-*.json"), folder / ENDED):
            path.unlink(missing_ok=True)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}.json"

    def _watch(self) -> None:
        beat, began = 0, time.monotonic()
        last = began
        while not self._over.wait(self._every):
            beat += 1
            with suppress(OSError):  # a disk that is full is told where it matters, and ranks are judged all the same
                self._tell(beat)
            now = time.monotonic()
            if (slept := now - last) > _ASLEEP * self._every:  # the whole job was suspended: nobody is late for that
                for seen in self._seen.values():
                    seen.heard, seen.moved = seen.heard + slept, seen.moved + slept
            last = now
            for rank in range(self.world):
                self._read(rank, now, began)
            if slept <= _ASLEEP * self._every:
                self._judge(now)

    def _tell(self, beat: int) -> None:
        told = {
            "beat": beat,
            "progress": self.progress,
            "step": self.step,
            "at": _place(sys._current_frames().get(self._main or 0)),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        aside = self._path(self.rank).with_suffix(".partial")
        remove(aside)  # a link would be followed
        aside.write_text(json.dumps(told))
        os.replace(aside, self._path(self.rank))

    def _read(self, rank: int, now: float, began: float) -> None:
        known = self._seen.setdefault(rank, _Seen({}, began, began))
        try:
            told = json.loads(self._path(rank).read_text())
        except (OSError, ValueError):
            return
        if told["beat"] != known.told.get("beat"):
            known.heard = now
        if told["progress"] != known.told.get("progress"):
            known.moved = now
        known.told = told

    def _judge(self, now: float) -> None:
        """Name the ranks that hold the others up: those that write no more, else those that are furthest behind."""
        waited = {rank: now - seen.moved for rank, seen in self._seen.items()}
        still = min(waited.values())  # ranks that do not wait for each other in every step may get on without one
        patience = max(self.silent_seconds, 3 * self._every)
        gone = [rank for rank, seen in self._seen.items() if rank != self.rank and now - seen.heard > patience]
        if still < self.silent_seconds and not gone:
            return
        least = min(seen.told.get("progress", -1) for seen in self._seen.values())
        behind = gone or [rank for rank, seen in self._seen.items() if seen.told.get("progress", -1) == least]
        speaker = min(set(self._seen) - set(gone))
        for rank in behind:
            if rank not in self._named or self._named[rank] != least:
                self._named[rank] = least
                if self.rank == speaker:
                    print(
                        f"{self.stage}: {self._sentence(rank, waited[rank], rank in gone)}", file=sys.stderr, flush=True
                    )
        if still > self.timeout_seconds:
            self._end(behind, gone, still, self.rank == speaker)

    def _sentence(self, rank: int, seconds: float, gone: bool) -> str:
        told = self._seen[rank].told
        if not told:
            return f"rank {rank} has not been heard of for {seconds:.0f} s"
        where = "it was last" if gone else "it is"
        step = "" if told["step"] is None else f" in step {told['step'] + 1}"
        return (
            f"rank {rank} ({told['host']}, process {told['pid']}) has not finished a {self.unit} for {seconds:.0f} s; "
            f"{where}{step} at {told['at']}"
        )

    def _end(self, behind: list[int], gone: list[int], seconds: float, speaks: bool) -> None:
        if speaks:
            names = ", ".join(map(str, behind))
            why = f"no progress for {seconds:.0f} s (strategy.timeout_minutes), waiting for rank {names}"
            self._note(why, behind[0])
            print(
                f"error: {self.stage}: {why}; the job ends, and the same command goes on with what is left to do",
                file=sys.stderr,
                flush=True,
            )
        elif self._over.wait(_LAST_WORDS * self._every):  # torchrun ends all others with the first one
            return
        for rank in gone:  # one that is stopped does not hear a polite signal
            told = self._seen[rank].told
            if told and told["host"] == socket.gethostname():
                try:
                    os.kill(told["pid"], signal.SIGKILL)
                except OSError:
                    continue
        os._exit(1)

    def _note(self, message: str, rank: int) -> None:
        """Beside the ranks' files, for who looks for the reason afterwards: of the rank that was waited for."""
        told = self._seen[rank].told
        who = {"rank": rank, "host": told.get("host"), "pid": told.get("pid"), "where": told.get("at")}
        with suppress(OSError):
            write_json(self.folder / ENDED, {"message": message, **who, "time": time.time()})


def _place(frame: FrameType | None) -> str:
    """File, line and function of the innermost frame that is this project's, or of the innermost one."""
    innermost = frame
    while frame is not None and not _is_own(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "an unknown place"
    name = frame.f_code.co_filename.removeprefix(_ROOT + "/")
    return f"{name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _is_own(file: str) -> bool:
    return file.startswith(_ROOT) and "/site-packages/" not in file.removeprefix(_ROOT)  # .venv may lie in it
