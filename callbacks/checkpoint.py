"""Checkpoints that survive a kill at any moment, written while training goes on."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch

from models.errors import NotFinite, Stopped
from models.files import remove
from models.training.checkpoint import FAILED, Share, finish, share, write
from models.training.saved import checkpoints, step_of

_PATIENCE_SECONDS = 120  # with a write, when training has ended with an error
_CLOCK_STEPS = 10  # the clock is a collective decision: not at every step


class Notice(Protocol):
    """That the job is about to end: a process that heeds it is let finish its step."""

    status: int  # to end with, 0 where no notice was given

    def heed(self) -> None: ...

    def unheed(self) -> None: ...


class Checkpoint(pl.Callback):
    """Saves `<folder>/step-00000040/` every so many steps or minutes, and once after the last step.

    Training stops for the copy to host memory alone; a thread writes it, and the next save waits for that. With
    `asynchronous=False` training waits, and no copy is taken; likewise where the optimizer is on NVMe. A checkpoint has
    another name until every rank has written its part, so whatever bears the final name is whole. Only optimizer-step
    boundaries are saved, and weights that are not finite never.
    """

    def __init__(
        self,
        folder: str | Path,
        every_steps: int | None,
        every_minutes: float | None,
        keep: int = 2,
        asynchronous: bool = True,
        notice: Notice | None = None,
    ) -> None:
        self.folder, self.every_steps, self.every_minutes, self.keep = Path(folder), every_steps, every_minutes, keep
        self.asynchronous, self.notice = asynchronous, notice
        self._group: Any = None  # of the ranks, to agree whether notice was given to any
        self._saved_at = time.monotonic()
        self._seen = 0
        self._writing: threading.Thread | None = None
        self._failed: list[BaseException] = []
        self._given_up = threading.Event()
        self._due = False  # after the validation of this step
        self._ending = 0  # the status to end with after this step

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:  # what a killed run left half written; a part of it would pass for a new one
            for left in self.folder.glob(".step-*"):
                remove(left)
            if (restored := getattr(module, "checkpoint", None)) is not None:
                for passed_over in checkpoints(self.folder):  # damaged: they are not among those that are kept
                    if step_of(passed_over) > step_of(restored):
                        damaged = self.folder / f"damaged-{passed_over.name}"
                        remove(damaged)  # of that step again, when it was trained anew
                        passed_over.rename(damaged)
        trainer.strategy.barrier()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._saved_at, self._seen = time.monotonic(), trainer.global_step
        if self.notice is not None:
            if trainer.world_size > 1:  # on the hosts, so that nobody waits for a GPU to say so
                self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=1))
            self.notice.heed()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._seen:  # inside an accumulated step
            return
        self._seen = step
        self._raise_failed()
        if step == trainer.max_steps:  # on_train_end, after the last validation
            return
        due = self.every_steps is not None and step % self.every_steps == 0
        if not due and self.every_minutes is not None and step % _CLOCK_STEPS == 0:
            late = time.monotonic() - self._saved_at > 60 * self.every_minutes
            due = bool(trainer.strategy.broadcast(late))  # ranks' clocks differ: rank 0 decides
        self._ending = self._notice_to_any()
        due = due or self._ending > 0
        self._due = due and _validates(trainer)
        if due and not self._due:
            self._save_or_end(trainer, module)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self._due:  # so that the checkpoint has the figures of its own step
            self._due = False
            self._save_or_end(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer, module, asynchronous=False)
        trainer.strategy.barrier()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        if self._writing is not None:
            self._writing.join(_PATIENCE_SECONDS)  # what was saved before the error is worth having
            self._given_up.set()
            self._writing.join()

    def _save_or_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.save(trainer, module, self.asynchronous and not self._ending)
        if self._ending:
            trainer.strategy.barrier()
            raise Stopped(trainer.global_step, self._ending)

    def on_fit_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.notice is not None:
            self.notice.unheed()

    def _notice_to_any(self) -> int:
        """The status that all ranks are to end with, or 0. A signal may reach one of them, or each in another step."""
        if self.notice is None or self._group is None:
            return 0 if self.notice is None else self.notice.status
        status = torch.tensor(self.notice.status)
        torch.distributed.all_reduce(status, torch.distributed.ReduceOp.MAX, group=self._group)
        return int(status)

    def save(self, trainer: pl.Trainer, module: Any, asynchronous: bool) -> None:
        self.wait()
        mine = share(trainer, module, copied=asynchronous)
        if not trainer.strategy.reduce_boolean_decision(mine.finite, all=True):
            raise NotFinite(
                f"step {trainer.global_step}: the weights are not finite; not saved, the last checkpoint "
                f"under {self.folder} is from before; lower the learning rate"
            )
        if asynchronous and mine.borrowed is None:
            self._writing = threading.Thread(target=self._write, args=[mine], name="checkpoint")
            self._writing.start()
        else:
            self._write(mine)
            self._raise_failed()
        self._saved_at = time.monotonic()

    def wait(self) -> None:
        """Until what is being written is in place."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        self._raise_failed()

    def _write(self, mine: Share) -> None:
        final = self.folder / f"step-{mine.head['step']:08d}"
        aside = final.with_name(f".{final.name}.partial")
        try:
            write(mine, aside)
            if mine.rank == 0:
                finish(mine, aside, final, self._given_up)
                for older in checkpoints(self.folder)[: -self.keep]:
                    remove(older)
        except BaseException as problem:
            self._failed.append(problem)
            with suppress(OSError):
                (aside / f"rank-{mine.rank:05d}{FAILED}").touch()

    def _raise_failed(self) -> None:
        """In the thread that trains; a file system's refusal, for one."""
        if self._failed:
            raise self._failed.pop()


def _validates(trainer: Any) -> bool:
    """Whether Lightning validates after this batch."""
    batches = trainer.fit_loop.epoch_loop.total_batch_idx + 1
    return bool(trainer.limit_val_batches and batches % trainer.val_check_batch == 0)
