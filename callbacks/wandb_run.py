"""A Weights & Biases run that never stops a training run when it opens, and loses nothing when it closes."""

import os
from collections.abc import Mapping
from typing import Any

import wandb
from pytorch_lightning.loggers import WandbLogger

from models.errors import Refusal

STEP = "trainer/global_step"  # Lightning's name for the x axis


class WandbRun(WandbLogger):
    """Lightning's logger over one W&B run, which starts at once and is finished with the fit, also when that fails.

    Online, the id stays the same over restarts, and steps that the server has are skipped. Offline, a second folder
    with the same id would replace the first when both are synced; so each restart is a run of its own,
    `<id>-r<restart>`. Lightning's logger leaves the run open: a process that ends with a signal or exit code 75 would
    then lose what is not yet written.
    """

    def __init__(self, *, identity: str, mode: str, restart: int, **settings: Any) -> None:
        run = _start(identity, mode, restart, settings)
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        logged = run.summary.get(STEP) if run.resumed else None
        self._logged_before = -1 if logged is None else int(logged)
        super().__init__(experiment=run, project=settings["project"], save_dir=settings["dir"], id=run.id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None or step > self._logged_before:
            super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        super().finalize(status)
        self.experiment.finish(exit_code=0 if status == "success" else 1)


def _start(identity: str, mode: str, restart: int, settings: dict[str, Any]) -> "wandb.Run":
    # this module prints the one line that a person needs, and a progress bar does not belong in a log
    wandb.setup(settings=wandb.Settings(silent=True, console="off"))
    reason = None
    if (wanted := os.environ.get("WANDB_MODE", "online")) != "online":
        reason = f"WANDB_MODE={wanted}"
    elif mode == "offline":
        reason = "logger.mode=offline"
    elif not wandb.login(prompt=False, verify=False):
        if mode == "online":
            raise Refusal("logger.mode=online: W&B finds no account; run wandb login, or use logger.mode=auto")
        reason = "no account found (wandb login)"
    if reason is None:
        try:
            run = wandb.init(id=identity, resume="allow", mode="online", **settings)
            print(f"W&B: {run.url}", flush=True)
            return run
        except wandb.errors.Error as error:
            if mode == "online":
                raise Refusal(f"logger.mode=online: {_first_line(error)}; use logger.mode=auto or offline") from None
            reason = _first_line(error)
    run = wandb.init(id=f"{identity}-r{restart}", mode="offline", **settings)
    print(f"W&B: offline, {reason}; later: wandb sync {os.path.dirname(run.dir)}", flush=True)
    return run


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
