"""Large weights on large inputs: Wanda's |w| · ‖x‖, summed over a unit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import Batch, Statistics, columns, fed_by, of_places, over_inputs, wanted


@dataclass(frozen=True)
class Wanda:
    """Σ |w| · ‖x‖₂ over the columns by which a unit enters the next matrix, ‖x‖₂ over all calibration tokens.

    arXiv:2306.11695, whose score is one weight's.
    """

    needs_calibration_data: ClassVar[bool] = True
    sees_experts: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp")

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        made: Statistics = {}

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            made[group.name] = read_NI.square().sum(0).cpu().numpy()

        over_inputs(model, wanted(anatomy, kinds), batch, take)
        return made

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        made = {}
        for group in wanted(anatomy, kinds):
            axis = fed_by(group)
            made[group.name] = of_places(np.sqrt(statistics[group.name]) * columns(model, axis, 1), axis)
        return made
