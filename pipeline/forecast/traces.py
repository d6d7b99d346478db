"""The steps of a stage that trains, traced at some micro-batches; what lies between is interpolated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.load import DTYPES, empty_model
from models.representations import decoder_layers
from models.sparsity import zeros
from models.tracing.depth import deepened, depths, shallow
from models.tracing.rounded import rounding_like
from models.tracing.step import Step, Work, made, trace
from pipeline.forecast.memory import TeacherHeld
from pipeline.forecast.workload import Trains
from pipeline.planned import outline_of

_WIDER = 4  # a micro-batch is traced, and one so many times as large: chunks of the loss engine grow up to some size
_NF4_BYTES = 0.5 + 0.127 / 8  # of a weight in NF4 with doubly quantized scales (arXiv:2305.14314)
_PACKED_BYTES = {"int8": 1.0, "nf4": _NF4_BYTES}
RECORDED = 64  # tokens kept of a recorded signal, where the encoding does not say


@dataclass
class Traces:
    trains: Trains
    kind: str  # cpu or cuda
    memory_bytes: int | None = None  # of the loss engine
    recorded: int = RECORDED
    again: bool = True  # with what activation checkpointing computes again, as it runs
    _steps: dict[tuple[str, int, bool], Step] = field(default_factory=dict)

    def step(self, compute: str, rows: int, accumulates: bool = True) -> Step:
        """`compute`: of models.tracing.step.COMPUTES; `rows`: the micro-batch."""
        given = self.trains.recipe.training.micro_batch
        if rows == given:
            return self._at(compute, rows, accumulates)
        least, most = (1, given) if rows < given else (given, _WIDER * given)
        two = [self._at(compute, least, accumulates), self._at(compute, most, accumulates)]
        by = (rows - least) / (most - least)
        return deepened(two.__getitem__, by, by)

    @property
    def beside(self) -> bool:
        """Whether a teacher's own weights are in the process."""
        source = self.trains.recipe.teacher
        return source is not None and source.recorded is None and source.runs_here

    def teacher(self, compute: str) -> TeacherHeld:
        source = self.trains.recipe.teacher
        if not self.beside or source is None:
            return TeacherHeld()
        model = empty_model(self.trains.teacher)
        width = 2 if compute == "bfloat16" else DTYPES[source.dtype].itemsize
        whole = width * sum(p.numel() for p in model.parameters())
        largest = width * max(sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules())
        offload = getattr(source, "offload", None)
        if (packed := source.packed_weights) is not None:
            matrices = _linear_weights(model)
            whole = round(whole - (width - _PACKED_BYTES[packed]) * matrices)
        return TeacherHeld(
            whole,
            largest,
            sharded=offload is not None,
            offloaded=offload not in (None, "none"),
            packed=packed is not None,
            on_disk=offload == "nvme",
        )

    @property
    def read(self) -> int:
        """Bytes of the start, as it is read."""
        return 4 * sum(p.numel() for p in empty_model(self.trains.student).parameters())

    def saved_by_packing(self) -> int:
        """Bytes by which a packed base of adapters (lora.base) is smaller than the fp32 that was traced."""
        lora = self.trains.recipe.lora
        if lora is None or lora.base is None:
            return 0
        return round((4 - _NF4_BYTES) * _linear_weights(empty_model(self.trains.student)))

    def _at(self, compute: str, rows: int, accumulates: bool) -> Step:
        key = (compute, rows, accumulates)
        if key not in self._steps:
            self._steps[key] = self._traced(compute, rows, accumulates)
        return self._steps[key]

    def _traced(self, compute: str, rows: int, accumulates: bool) -> Step:
        student, teacher = self.trains.student, self.trains.teacher if self.beside else None
        compared = bool(self.trains.recipe.objective.representations)  # by the numbers of their layers
        of_student = None if compared else depths(student)
        of_teacher = None if compared or teacher is None else depths(teacher)
        if of_student is None and of_teacher is None:
            return trace(self._work(rows, student, teacher), compute, self.kind, accumulates)

        def at(number: int) -> Step:
            small = student if of_student is None else shallow(student, of_student[number])
            beside = teacher if of_teacher is None else shallow(teacher, of_teacher[number])
            return trace(self._work(rows, small, beside), compute, self.kind, accumulates)

        return deepened(at, _lacking(student, of_student), _lacking(teacher, of_teacher))

    def _work(self, rows: int, student: Any, teacher: Any) -> Work:
        recipe = self.trains.recipe
        source, data = recipe.teacher, recipe.data
        own = data.teacher_prompts if source is not None else 0
        return Work(
            student=lambda: self._student(student),
            teacher=None if teacher is None or source is None else lambda: made(teacher, DTYPES[source.dtype]),
            objective=recipe.objective,
            optimizer=recipe.training.optimizer,
            rows=rows,
            length=data.max_length,
            vocabulary=student.get_text_config().vocab_size,
            teacher_rows=rows * own or None,
            teacher_length=data.teacher_max_length if own else None,
            kept=None if source is None or self.beside else self.recorded,
            configs=(student, teacher) if recipe.objective.representations else None,
            activation_checkpointing=recipe.training.activation_checkpointing and self.again,
            memory_bytes=self.memory_bytes,
        )

    def _student(self, config: Any) -> Any:
        """As pipeline/training/student.py makes it."""
        recipe = self.trains.recipe
        model = made(config, torch.float32)
        if recipe.lora is not None:
            model = replace(recipe.lora, base=None).attach(model, 0, recipe.saved)
        if recipe.keep_zeros:
            model = zeros.keep(model)
        if recipe.qat is not None and self.trains.start is not None:
            rounding = rounding_like(recipe.qat, outline_of(Path(self.trains.start)), model)
            model = model if rounding is None else rounding.attach(model)
        return model


def _lacking(config: Any, two: tuple[int, int] | None) -> float:
    return 0.0 if two is None else config.get_text_config().num_hidden_layers - two[0]


def _linear_weights(model: Any) -> int:
    return sum(p.numel() for p in decoder_layers(model).parameters() if p.dim() == 2)


def micro_batches(global_batch: int, ranks: int) -> list[int]:
    """Those that divide an optimizer step over so many ranks evenly."""
    if global_batch % ranks:
        return []
    each = global_batch // ranks
    small = [m for m in range(1, math.isqrt(each) + 1) if each % m == 0]
    return sorted({*small, *(each // m for m in small)})
