"""What the doctor's checks of loss and models look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline.data.loader import PackedSequences


@dataclass
class Probed:
    """A training about to begin."""

    trainer: Any
    module: Any
    data: PackedSequences
    vocabulary: int  # of the tokenizer that the text was read with

    @property
    def low(self) -> bool:
        return str(self.trainer.precision).startswith("bf16")

    @property
    def teacher(self) -> Any:
        """Its model, where it lives here whole and reads the same tokens; else None."""
        model = getattr(self.module.teacher, "model", None)
        return (
            model
            if isinstance(model, torch.nn.Module) and "teacher_input_ids" not in self.data.train.column_names
            else None
        )

    def summed(self, values: Sequence[float]) -> list[float]:
        """Over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64, device=self.module.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        found: list[float] = total.tolist()
        return found

    def most(self, value: int) -> int:
        found = torch.tensor(value, device=self.module.device)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)
