"""Lightning checkpoints that survive a kill at any moment."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from models.errors import NotFinite

_PARTIAL = ".partial"
_CLOCK_STEPS = 10  # the clock is a collective decision: not at every step


class Checkpoint(pl.Callback):
    """Saves `<folder>/step-00000040.ckpt` every so many steps or minutes, and once after the last step.

    A checkpoint is written under another name and renamed when every rank is done, so whatever bears the final name
    is whole. Only optimizer-step boundaries are saved. Weights that are not finite are never saved.
    """

    def __init__(self, folder: str | Path, every_steps: int | None, every_minutes: float | None, keep: int = 1) -> None:
        self.folder, self.every_steps, self.every_minutes, self.keep = Path(folder), every_steps, every_minutes, keep
        self._saved_at = time.monotonic()
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_at, self._seen = time.monotonic(), trainer.global_step
        if trainer.global_step == 0:
            return
        # Lightning counts micro-batches; after a restart with another micro-batch size its count would end the first
        # step early. These are the numbers as it saves them at the end of a batch.
        done = trainer.global_step * trainer.accumulate_grad_batches
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        for counter in (progress.total, progress.current):
            counter.ready = counter.started = counter.processed = done
            counter.completed = done - 1

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:  # inside an accumulated step
            return
        self._seen = step
        if step == trainer.max_steps:  # on_train_end, after the last validation
            return
        due = self.every_steps is not None and step % self.every_steps == 0
        if not due and self.every_minutes is not None and step % _CLOCK_STEPS == 0:
            late = time.monotonic() - self._saved_at > 60 * self.every_minutes
            due = bool(trainer.strategy.broadcast(late))  # ranks' clocks differ: rank 0 decides
        if due:
            self.save(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer, module)

    def save(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = [
            getattr(p, "ds_tensor", p) for p in module.parameters() if p.requires_grad
        ]  # ZeRO-3: this rank's shard
        fine = all(bool(torch.isfinite(p).all()) for p in weights)
        if not trainer.strategy.reduce_boolean_decision(fine, all=True):
            raise NotFinite(
                f"step {trainer.global_step}: the weights are not finite; not saved, the last checkpoint "
                f"under {self.folder} is from before; lower the learning rate"
            )
        final = self.folder / f"step-{trainer.global_step:08d}.ckpt"
        aside = final.with_name(f".{final.name}{_PARTIAL}")
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            _remove(aside)
        trainer.strategy.barrier()
        trainer.save_checkpoint(aside)
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            for path in [aside, *(aside.rglob("*") if aside.is_dir() else [])]:
                _fsync(path)
            _remove(final)
            os.rename(aside, final)
            _fsync(self.folder)
            for older in checkpoints(self.folder)[: -self.keep]:
                _remove(older)
        trainer.strategy.barrier()
        self._saved_at = time.monotonic()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
