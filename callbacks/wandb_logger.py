"""A stage's W&B run as the logger of a Lightning Trainer."""

from collections.abc import Mapping
from typing import Any

import wandb
from pytorch_lightning.loggers import WandbLogger

from callbacks.wandb_run import lost, surviving

STEP = "trainer/global_step"  # Lightning's name for the x axis


class WandbRun(WandbLogger):
    """Lightning's logger over a run that was started already and is ended by others: what a stage makes of its training
    belongs in the same run, and so does why it ended otherwise. Steps that the server has are skipped. A run that
    breaks off is told of once, and the training goes on."""

    def __init__(self, run: "wandb.Run", *, project: str, folder: str) -> None:
        run.define_metric(STEP)
        run.define_metric("*", step_metric=STEP, step_sync=True)
        logged = run.summary.get(STEP) if run.resumed else None
        self._logged_before = -1 if logged is None else int(logged)
        super().__init__(experiment=run, project=project, save_dir=folder, id=run.id)

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if (step is None or step > self._logged_before) and not lost():
            with surviving():
                super().log_metrics(metrics, step)

    def log_hyperparams(self, params: Any) -> None:
        if not lost():
            with surviving():
                super().log_hyperparams(params)
