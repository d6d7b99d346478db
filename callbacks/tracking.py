"""Where a stage's metrics go besides its own metrics.jsonl: a CSV file, TensorBoard or Weights & Biases.

The functions without an underscore are the `_target_`s of conf/logger. They refuse what is missing, load nothing heavy
and return a Tracker, which the stage's process calls on rank zero. Logs lie in the `folder` that it gets,
`<run_dir>/logs/<stage>`, which outlives the stage's work folder.

CSV, TensorBoard and W&B offline start empty at every restart; MetricsFile then passes them the steps before it.
"""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from models.errors import Refusal
from models.files import write_text

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

MODES = ("auto", "online", "offline")


class Tracker(Protocol):
    """A tracker may also have, each by these names: `finished(…, path, manifest)`, called like the tracker itself when
    a stage of any kind is done, with its folder and what manifest.json says; `ended(problem)`, when it ended otherwise;
    `closed(run_name, folder, config, report)`, when all are done, with what report.json holds; `reachable()`, which
    logs nothing."""

    def __call__(self, *, stage: str, run_name: str, folder: Path, config: dict[str, Any], restart: int) -> "Logger":
        """`config` is the resolved configuration, `restart` how often this stage was started before."""


def csv() -> Tracker:
    """`<folder>/metrics.csv` and hparams.yaml, flushed at every line."""

    def make(*, stage: str, run_name: str, folder: Path, config: dict[str, Any], restart: int) -> "Logger":
        from pytorch_lightning.loggers import CSVLogger

        _clear(folder, "metrics.csv", "hparams.yaml")
        logger = CSVLogger(folder.parent, name=folder.name, version="", flush_logs_every_n_steps=1)
        logger.log_hyperparams(config)
        return logger

    return make


def tensorboard() -> Tracker:
    """Event files in `folder`: `tensorboard --logdir <run_dir>/logs` shows the stages side by side."""
    _need("tensorboard")

    def make(*, stage: str, run_name: str, folder: Path, config: dict[str, Any], restart: int) -> "Logger":
        from pytorch_lightning.loggers import TensorBoardLogger

        _clear(folder, "events.out.tfevents.*", "hparams.yaml")
        logger = TensorBoardLogger(folder.parent, name=folder.name, version="", default_hp_metric=False)
        logger.log_hyperparams(config)
        return logger

    return make


def wandb(*, project: str, entity: str | None = None, mode: str = "auto", tags: tuple[str, ...] = ()) -> "Wandb":
    """One W&B run for each stage: group = the run's name, job type = the stage; the report's has job type report.

    `auto` is online where W&B finds an account (WANDB_API_KEY, netrc, settings) and its server answers, else offline.
    WANDB_MODE=offline overrides every mode. `wandb sync` uploads an offline run later.
    """
    _need("wandb")
    if mode not in MODES:
        raise Refusal(f"logger.mode={mode}: need {', '.join(MODES)}")
    return Wandb(mode, {"project": project, "entity": entity, "tags": list(tags)})


class Wandb:
    """What is logged of a stage that trains, and what all stages leave: see Tracker."""

    def __init__(self, mode: str, settings: dict[str, Any]) -> None:
        self.mode, self.settings = mode, settings

    def __call__(self, *, stage: str, run_name: str, folder: Path, config: dict[str, Any], restart: int) -> "Logger":
        from callbacks.wandb_logger import WandbRun

        run = self._start(stage, run_name, folder, config, restart)
        return WandbRun(run, project=self.settings["project"], folder=str(folder))

    def finished(
        self,
        *,
        stage: str,
        run_name: str,
        folder: Path,
        config: dict[str, Any],
        restart: int,
        path: Path,
        manifest: dict[str, Any],
    ) -> None:
        from callbacks import wandb_run

        if wandb_run.lost():
            return
        with _told_alone(f"{stage} is done, and not all of it is logged"):
            run = wandb_run.opened() or self._start(stage, run_name, folder, config, restart)
            wandb_run.log_result(run, run_name, stage, path, manifest)
        wandb_run.end()

    def ended(self, problem: BaseException) -> None:
        from callbacks import wandb_run

        wandb_run.end(problem)

    def closed(self, *, run_name: str, folder: Path, config: dict[str, Any], report: dict[str, Any]) -> None:
        from callbacks import wandb_run

        before = max(int((folder / "wandb-id").exists()), len(list((folder / "wandb").glob("offline-run-*"))))
        with _told_alone("the report's table is not logged"):
            run = self._start("report", run_name, folder, config, before)
            wandb_run.log_table(run, report)
        wandb_run.end()

    def reachable(self) -> tuple[bool, str]:
        """Whether runs will arrive at the server as they are asked to, and in words; nothing is logged."""
        from callbacks import wandb_run

        return wandb_run.reachable(self.mode)

    def _start(self, job: str, run_name: str, folder: Path, config: dict[str, Any], restart: int) -> Any:
        from callbacks import wandb_run

        folder.mkdir(parents=True, exist_ok=True)
        name = f"{run_name}-{job}"
        of_sweep = job == "report" and "WANDB_SWEEP_ID" in os.environ
        settings = {"group": run_name, "job_type": job, "name": name, "config": config, "dir": str(folder)}
        identity = None if of_sweep else _identity(folder, name, restart)
        return wandb_run.start(identity, self.mode, restart, {**self.settings, **settings})


@contextmanager
def _told_alone(what: str) -> Iterator[None]:
    """What is finished stays finished, whatever the tracker says to it."""
    try:
        yield
    except Exception as problem:
        print(f"W&B: {what}: {(str(problem) or type(problem).__name__).splitlines()[0]}", flush=True)


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise Refusal(f"logger={package}: {package} is not installed; pip install {package}, or choose logger=csv")


def _clear(folder: Path, *patterns: str) -> None:
    """Remove what an earlier start of the stage logged here; Lightning would warn, and append to some of it."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            path.unlink()


def _identity(folder: Path, name: str, restart: int) -> str:
    """The run's id on the server, kept beside the logs so that every restart goes on in the same run.

    It ends in a random part: two folders may hold runs of one name, and W&B does not accept the id of a deleted run.
    """
    path = folder / "wandb-id"
    if restart and path.exists():
        return path.read_text().strip()
    identity = f"{re.sub(r'[^A-Za-z0-9_-]+', '-', name)[:48]}-{secrets.token_hex(4)}"
    write_text(path, identity + "\n")
    return identity
