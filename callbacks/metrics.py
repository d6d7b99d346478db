"""metrics.jsonl, which every training run writes: one JSON object for each line, readable after any kill."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.trainer.states import TrainerFn

from models.files import write_text

Line = dict[str, Any]


class MetricsFile(pl.Callback):
    """Append what the module measured to `path`, and pass the same numbers to every logger of the trainer.

    The module sets, on every rank, `step_metrics` before `on_train_batch_end` (None: not a step to log) and
    `validation_metrics` before `on_validation_end`; Lightning calls callbacks before the module's own hook of that
    name. Both are dicts of numbers, already reduced over ranks; `step` defaults to the trainer's global step. Only
    rank zero writes. Numbers that are not finite become null.

    On a restart at step k the file keeps only the lines of steps up to k, and the loggers get those lines before any
    new one. So a logger that starts empty in every process (CSV, TensorBoard, W&B offline) holds the whole run; one
    that continues (W&B online) skips the steps it has. No step is written twice.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._last: dict[bool, float] = {False: -1, True: -1}  # last step on file: of training, of validation
        self._begun = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._begin(trainer)

    def on_fit_end(self, trainer: pl.Trainer, module: Any) -> None:
        if not self._begun:  # restarted after the last step: there was nothing to train, but the loggers are empty
            self._begin(trainer)

    def _begin(self, trainer: pl.Trainer) -> None:
        self._begun = True
        if not trainer.is_global_zero:
            return
        lines = [line for line in _read(self.path) if line["step"] <= trainer.global_step]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, "".join(map(_text, lines)))
        self._last = {False: -1, True: -1}
        for line in lines:
            self._last[_is_validation(line)] = line["step"]
            _log(trainer, line)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self._write(trainer, module.step_metrics)

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, module.validation_metrics)

    def _write(self, trainer: pl.Trainer, metrics: Mapping[str, float] | None) -> None:
        if metrics is None or not trainer.is_global_zero:
            return
        line = {"step": trainer.global_step, **metrics}
        kind = _is_validation(line)
        if line["step"] <= self._last[kind]:  # a micro-batch that ended no step still shows the last one's numbers
            return
        self._last[kind] = line["step"]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_text(line))
        _log(trainer, line)


def _is_validation(line: Line) -> bool:
    return "validation_loss" in line


def _read(path: Path) -> list[Line]:
    """The lines of `path`, without what a kill tore and what was changed to something else."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if _is_line(line):
            lines.append(line)
    return lines


def _is_line(value: Any) -> bool:
    """Whether `_write` may have written it."""
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        return False
    return all(each is None or isinstance(each, int | float) for each in value.values())


def _text(line: Line) -> str:
    finite = {key: value if math.isfinite(value or 0) else None for key, value in line.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _log(trainer: pl.Trainer, line: Line) -> None:
    metrics = {key: value for key, value in line.items() if key != "step" and value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=line["step"])
