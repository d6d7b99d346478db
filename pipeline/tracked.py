"""What the chosen logger is told beside the curves of a training: what a stage has made, why it ended, the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact

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
def tracked(context: Context) -> Iterator[None]:
    """Around the work of a stage, on every rank; rank 0 tells."""
    tracker: Any = tracker_of(context.config) if context.rank == 0 else None
    try:
        yield
    except BaseException as problem:
        if (ended := getattr(tracker, "ended", None)) is not None:
            ended(problem)
        raise
    manifest = artifact.read_manifest(context.out)
    if (finished := getattr(tracker, "finished", None)) is not None and manifest is not None:
        finished(**of_stage(context), path=context.out, manifest=manifest)


def closed(config: dict[str, Any], report: dict[str, Any]) -> None:
    """After the last stage, in the process of the front door."""
    tracker = tracker_of(config)
    if hasattr(tracker, "closed"):
        folder = Path(config["run_dir"]) / "logs" / "report"
        tracker.closed(run_name=run_name(config), folder=folder, config=config, report=report)
