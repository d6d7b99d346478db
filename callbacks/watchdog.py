"""Ends a job of several ranks that has stopped, and names the rank that the others wait for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from callbacks.heartbeat import Heartbeat
from models.errors import Refusal


class Watchdog(pl.Callback):
    """Nothing on one rank. Progress is a micro-batch, of training or of validation; nobody is watched before the first.
    Stages that do not train, and what comes after training, `begin` a watch of their own.

    `folder`: of the checkpoints; the files through which ranks watch each other lie beside it.
    """

    def __init__(self, stage: str, folder: str | Path, silent_seconds: float, timeout_minutes: float) -> None:
        for name, value in {"silent_seconds": silent_seconds, "timeout_minutes": timeout_minutes}.items():
            if not value > 0:
                given = " (strategy.timeout_minutes, unless set itself)" if name == "timeout_minutes" else ""
                raise Refusal(f"callbacks.watchdog.{name}={value}{given}: need a number above 0")
        self.stage, self.folder = stage, Path(folder).parent / "ranks"
        self.silent_seconds, self.timeout_seconds = silent_seconds, 60 * timeout_minutes
        self._heart: Heartbeat | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        # Not on_fit_start: after it the module restores a checkpoint and reads a sharded teacher, which may take long.
        if trainer.world_size > 1:
            if trainer.is_global_zero:
                self.clear()
            trainer.strategy.barrier()
            self._heart = self.begin(trainer.global_rank, trainer.world_size)
            self._heart.step = trainer.global_step

    def clear(self) -> None:
        """By one rank, before any begins."""
        Heartbeat.clear(self.folder)

    def begin(self, rank: int, world: int, unit: str = "micro-batch") -> Heartbeat:
        """Whose `progress` is to be counted up with every `unit`, until it is stopped."""
        heart = Heartbeat(self.stage, self.folder, rank, world, self.silent_seconds, self.timeout_seconds, unit)
        heart.start()
        return heart

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._count(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _count(self, trainer: pl.Trainer) -> None:
        if self._heart is not None:
            self._heart.progress += 1
            self._heart.step = trainer.global_step

    def _stop(self) -> None:
        if self._heart is not None:
            self._heart.stop()
            self._heart = None
