"""What the chosen logger is told beside the curves of a training: what a stage has made, why it ended, the report."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Stopped
from pipeline import artifact

_SECONDS = 60  # that a tracker has to say why a stage ended; its ranks hold their GPUs meanwhile
_SECONDS_OF_NOTICE = 10  # and where the job is about to be ended: Slurm kills 30 s after SIGTERM

if TYPE_CHECKING:
    from pipeline.context import Context


def tracker_of(config: dict[str, Any]) -> Any:
    """None where nothing is logged."""
    from hydra.utils import instantiate

    return None if config["logger"] is None else instantiate(config["logger"])


def run_name(config: dict[str, Any]) -> str:
    """What its stages are grouped by: its name, and its folder's where that is another one, as in a sweep."""
    name, folder = str(config["name"]), Path(config["run_dir"]).name
    return name if folder == name else f"{name}-{folder}"


def of_stage(context: Context) -> dict[str, Any]:
    """What a tracker is called with for a stage."""
    return {
        "stage": context.stage,
        "run_name": run_name(context.config),
        "folder": context.run_dir / "logs" / context.stage,
        "config": context.config,
        "restart": context.restart,
    }


@contextmanager
def tracked(context: Context, before: Callable[[BaseException], int] = lambda _: 1) -> Iterator[None]:
    """Around the work of a stage, on every rank; rank 0 tells. `before` is given the problem of a stage that failed
    before the tracker is, and says with which status the process is to end. Of a share nothing is told: the stage that
    takes it over has the run."""
    tracker: Any = tracker_of(context.config) if context.rank == 0 and context.share is None else None
    try:
        yield
    except BaseException as problem:
        status = before(problem)
        if (ended := getattr(tracker, "ended", None)) is not None:
            _end(ended, problem, status)
        raise
    manifest = artifact.read_manifest(context.out)
    if (finished := getattr(tracker, "finished", None)) is not None and manifest is not None:
        finished(**of_stage(context), path=context.out, manifest=manifest)


def _end(ended: Callable[[BaseException], None], problem: BaseException, status: int) -> None:
    """The tracker's end, which neither raises nor is waited for without a limit."""

    def end() -> None:
        try:
            ended(problem)
        except Exception as own:
            print(f"logger: not ended in good order, {type(own).__name__}: {own}".splitlines()[0], flush=True)

    ending = threading.Thread(target=end, daemon=True)
    ending.start()
    seconds = _SECONDS_OF_NOTICE if isinstance(problem, Stopped) else _SECONDS
    ending.join(seconds)
    if ending.is_alive():
        print(f"logger: the tracker does not answer; not waited for any longer than {seconds} s", flush=True)
        atexit.register(_leave, status)  # before the tracker's own exit handlers, which would wait for it again


def _leave(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def closed(config: dict[str, Any], report: dict[str, Any]) -> None:
    """After the last stage, in the process of the front door."""
    tracker = tracker_of(config)
    if hasattr(tracker, "closed"):
        folder = Path(config["run_dir"]) / "logs" / "report"
        tracker.closed(run_name=run_name(config), folder=folder, config=config, report=report)
