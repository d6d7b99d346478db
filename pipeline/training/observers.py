"""What watches a training run: the logger and the callbacks that the configuration names."""

from __future__ import annotations

import inspect
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate

from pipeline import artifact
from pipeline.context import Context
from pipeline.notice import notice
from pipeline.tracked import of_stage, tracker_of


def logger_of(context: Context) -> Any:
    """What `Trainer(logger=…)` takes; only rank 0 logs."""
    tracker = tracker_of(context.config) if context.rank == 0 else None
    return False if tracker is None else tracker(**of_stage(context))


def callbacks_of(context: Context) -> list[pl.Callback]:
    """The callbacks of the configuration: pipeline/ does not know their classes, and Hydra makes them. Each is given
    those of these words that its signature has: `stage`, `path` (of the metrics), `folder` (of the checkpoints),
    `notice` (that the job is about to end)."""
    return [_made(node, context) for node in context.config["callbacks"].values() if node is not None]


def watchdog_of(context: Context) -> Any:
    """What watches over ranks that work without Lightning: the callback that the configuration calls watchdog, which
    has `clear` and `begin`. None where there is none."""
    node = context.config["callbacks"].get("watchdog")
    made = None if node is None else _made(node, context)
    return made if hasattr(made, "begin") else None


def _made(node: Any, context: Context) -> pl.Callback:
    words = {
        "stage": context.stage,
        "path": context.work / artifact.METRICS,
        "folder": context.work / "checkpoints",
        "notice": notice,
    }
    make = instantiate(node, _partial_=True)
    wanted = inspect.signature(make.func).parameters
    made: pl.Callback = make(**{name: value for name, value in words.items() if name in wanted})
    return made
