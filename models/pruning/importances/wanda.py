"""Large weights on large inputs: Wanda's |w| · ‖x‖, summed over a unit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import columns, of_places, over_inputs, wanted


@dataclass(frozen=True)
class Wanda:
    """Σ |w| · ‖x‖₂ over the columns by which the next matrix reads a unit, ‖x‖₂ over all calibration tokens.

    arXiv:2306.11695, whose score is one weight's.
    """

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp")

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        groups = wanted(anatomy, kinds)
        squares = {group.name: np.zeros(1) for group in groups}

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            squares[group.name] = squares[group.name] + read_NI.double().square().sum(0).cpu().numpy()

        over_inputs(model, groups, batches, take)
        made = {}
        for group in groups:
            axis = next(axis for axis in group.axes if axis.silences)
            made[group.name] = of_places(np.sqrt(squares[group.name]) * columns(model, axis, 1), axis)
        return made
