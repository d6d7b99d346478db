"""What tensors really take: tests/forecast/peak_memory.c, compiled and preloaded, and the callback that asks it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

COMPILER = shutil.which("cc") if sys.platform == "linux" else None
SOURCE = Path(__file__).with_name("peak_memory.c")


def compiled(folder: Path) -> Path:
    """The library that is to stand in LD_PRELOAD."""
    library = folder / "peak_memory.so"
    assert COMPILER is not None
    command = [COMPILER, "-shared", "-fPIC", "-O2", "-o", library, SOURCE, "-ldl", "-lpthread"]
    subprocess.run(command, check=True)
    return library


class PeakMemory(pl.Callback):
    """Writes the most bytes that tensors had at once in a stage's micro-batches from `first` on."""

    def __init__(self, stage: str, out: str, first: int) -> None:
        self.file, self.first = f"{out}-{stage}-{os.environ.get('RANK', '0')}.json", first
        self.counted = ctypes.CDLL(None)
        self.counted.peak_memory_most.restype = ctypes.c_long

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        # What is mapped from a file, as weights that were read, would not be counted.
        partitioned = hasattr(trainer.strategy, "deepspeed_engine")
        for parameter in module.parameters():
            if not partitioned or not (parameter.requires_grad or hasattr(parameter, "ds_id")):
                parameter.data = parameter.data.clone()

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.first:
            self.counted.peak_memory_begin()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx >= self.first:
            Path(self.file).write_text(json.dumps(self.counted.peak_memory_most()))
