"""What a stage trains: all that decides the numbers, beside the prepared text and the start's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from models.lora import Lora
from models.objectives.term import Objective
from models.quantization.aware import Aware
from models.teachers.teacher import Source
from models.training.on_policy import OnPolicy
from pipeline.data.source import DataSource
from pipeline.training.settings import SAVED, Training


@dataclass(frozen=True, kw_only=True)
class Recipe:
    objective: Objective
    data: DataSource
    training: Training
    precision: Any  # a key of SAVED
    teacher: Source | None = None  # None: the objective asks none
    align: bool = False  # the teacher's tokenizer is another: sequences carry its tokens and the spans between both
    on_policy: OnPolicy | None = None  # some of the steps are on text that the student writes
    lora: Lora | None = None  # adapters are trained and merged; they are written beside the model too, in `adapter/`
    keep_zeros: bool = False  # the start's zeros stay (models/sparsity/zeros.py); masked adapters make no `adapter/`
    qat: Aware | None = None  # the start has a record of its quantized weights, and its matrices stay quantized

    @property
    def saved(self) -> torch.dtype:
        """Of the finished model's weights."""
        return SAVED[self.precision]
