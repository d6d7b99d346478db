"""How a training stage shows its progress: a bar on a terminal, a line now and then in a log."""

import json
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column

from models.files import remove

_FILE_SECONDS = 10


class Progress(pl.Callback):
    """Stage, step of total, loss, tokens/s and the time left; on rank zero, and from the right step after a restart.

    Reads the module's `step_metrics` (loss, tokens_per_second) and `validation_metrics` (validation_loss), as
    MetricsFile does. Where stdout is no terminal a plain line is printed every `every_fraction` of the steps or
    `every_seconds`, whichever comes first, and at the end; the first after `first_seconds`, and the next ones each
    after twice the time, until that is `every_seconds`. Figures stand in the first line after them alone. The
    trainer needs `enable_progress_bar=False`.

    Whatever is shown also stands in progress.json beside `folder` (of the checkpoints), not much older than
    `_FILE_SECONDS`, for who asks from elsewhere.
    """

    def __init__(
        self,
        stage: str,
        every_fraction: float = 0.1,
        every_seconds: float = 300.0,
        first_seconds: float = 20.0,
        console: Console | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.stage = stage
        self._file = None if folder is None else Path(folder).parent / "progress.json"
        self._written = 0.0
        self._told: dict[str, float] = {}
        self.every_fraction = every_fraction
        self.every_seconds = every_seconds
        self.first_seconds = first_seconds
        self._wait = 0.0
        self.console = console or Console()
        self._bar: Bar | None = None
        self._numbers: dict[str, str] = {}
        self._step = self._next_step = self._printed_step = 0
        self._started: tuple[int, float] | None = None
        self._printed = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        if not trainer.is_global_zero:
            return
        self._step = self._printed_step = trainer.global_step
        total = trainer.max_steps if trainer.max_steps > 0 else None  # -1: the epochs decide
        self._started, self._printed = None, time.monotonic()
        self._wait = min(self.first_seconds, self.every_seconds)
        self._next_step = self._step + self._stride(trainer)
        if self.console.is_terminal:
            narrow = Column(no_wrap=True)
            self._bar = Bar(
                TextColumn("{task.description}", style="bold", markup=False, table_column=narrow),
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=narrow),
                TextColumn("{task.fields[numbers]}", markup=False, table_column=narrow),
                console=self.console,
                expand=True,
                refresh_per_second=4,
            )
            self._bar.start()
            self._bar.add_task(self.stage, total=total, completed=self._step, numbers="")
        elif self._step:
            self._print(f"{self.stage}: goes on at step {self._step}/{total or '?'}")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        metrics: dict[str, float] = module.step_metrics or {}
        self._told |= {key: metrics[key] for key in ("loss", "tokens_per_second") if key in metrics}
        if not self._bar and metrics.get("step", trainer.global_step) <= self._printed_step:
            metrics = {}  # told
        if "loss" in metrics:
            self._numbers["loss"] = f"loss {metrics['loss']:.3f}"
        if "tokens_per_second" in metrics:
            self._numbers["speed"] = f"{metrics['tokens_per_second']:,.0f} tokens/s"
        if trainer.global_step > self._step:
            self._step = trainer.global_step
            self._show(trainer)

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=f"{self.stage}: validating")

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not trainer.is_global_zero:
            return
        if "validation_loss" in module.validation_metrics:
            self._numbers["validation"] = f"validation {module.validation_metrics['validation_loss']:.3f}"
            self._told["validation_loss"] = module.validation_metrics["validation_loss"]
        if self._bar:
            self._bar.update(self._bar.task_ids[0], description=self.stage, numbers=self._text(trainer))

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self._write(trainer)
        if (
            trainer.is_global_zero
            and not self._bar
            and (self._step > self._printed_step or "validation" in self._numbers)
        ):
            self._print_step(trainer)
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: Any, exception: BaseException) -> None:
        if trainer.is_global_zero:
            self._write(trainer)
        self._stop()  # or the bar would draw over the message

    def _stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _stride(self, trainer: pl.Trainer) -> int:
        return max(1, round(self.every_fraction * trainer.max_steps))

    def _show(self, trainer: pl.Trainer) -> None:
        now = time.monotonic()
        if self._started is None:
            self._started = self._step, now  # after the first step: compiling and warming up predict nothing
        if now - self._written >= _FILE_SECONDS:
            self._write(trainer)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._step, numbers=self._text(trainer))
        elif self._step == trainer.max_steps:
            return  # the last line waits for the last validation
        elif self._step >= self._next_step or now - self._printed >= self._wait:
            self._next_step = (self._step // self._stride(trainer) + 1) * self._stride(trainer)
            self._wait = min(2 * self._wait, self.every_seconds)
            self._print_step(trainer)

    def _print_step(self, trainer: pl.Trainer) -> None:
        self._printed, self._printed_step = time.monotonic(), self._step
        of = f"/{trainer.max_steps} ({100 * self._step // trainer.max_steps} %)" if trainer.max_steps > 0 else ""
        self._print(f"{self.stage}: step {self._step}{of}  {self._text(trainer)}")
        self._numbers.clear()  # told: without newer ones the next line has none, or they would pass for its step's

    def _text(self, trainer: pl.Trainer) -> str:
        parts = [self._numbers[key] for key in ("loss", "validation", "speed") if key in self._numbers]
        if (left := self._seconds_left(trainer)) is not None:
            minutes, seconds = divmod(round(left), 60)
            parts.append(f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
        return "  ".join(parts)

    def _seconds_left(self, trainer: pl.Trainer) -> float | None:
        first, since = self._started or (self._step, 0.0)
        if self._step <= first or trainer.max_steps <= self._step:
            return None
        return (trainer.max_steps - self._step) * (time.monotonic() - since) / (self._step - first)

    def _write(self, trainer: pl.Trainer) -> None:
        self._written = time.monotonic()
        if self._file is None:
            return
        told = {
            "step": self._step,
            "steps": trainer.max_steps if trainer.max_steps > 0 else None,
            **{key: value if math.isfinite(value) else None for key, value in self._told.items()},
            "seconds_left": self._seconds_left(trainer),
            "time": time.time(),
        }
        aside = self._file.with_suffix(".partial")
        with suppress(OSError):  # a full disk is told where it matters; nobody waits for a sync, and the next is soon
            remove(aside)  # a link would be followed
            aside.write_text(json.dumps(told))
            os.replace(aside, self._file)

    def _print(self, line: str) -> None:
        # soft_wrap: a log has no width, a line stays a line
        self.console.print(line, soft_wrap=True, markup=False, highlight=False)
        self.console.file.flush()
