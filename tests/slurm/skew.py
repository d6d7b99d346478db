"""A callback that keeps ranks apart: none ends a step when another one does."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import pytorch_lightning as pl


class Skew(pl.Callback):
    """Every micro-batch takes up to `seconds` longer, on each rank another time."""

    def __init__(self, seconds: float = 0.3) -> None:
        self.seconds, self._random = seconds, random.Random(os.getpid())

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        time.sleep(self._random.uniform(0, self.seconds))
