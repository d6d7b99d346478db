"""Units that always say the same: what they add could be a constant."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import columns, of_places, over_inputs, wanted


@dataclass(frozen=True)
class Fluctuation:
    """Σ Var(x) · ‖w‖² over the columns by which the next matrix reads a unit, the variance over calibration tokens.

    FLAP, arXiv:2312.11983, without its standardisation between layers and the bias it leaves in a unit's place.
    """

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp")

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        groups = wanted(anatomy, kinds)
        moments = {group.name: np.zeros((2, 1)) for group in groups}
        tokens = dict.fromkeys(moments, 0)

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            read_NI = read_NI.double()
            seen = np.stack([read_NI.sum(0).cpu().numpy(), read_NI.square().sum(0).cpu().numpy()])
            moments[group.name] = moments[group.name] + seen
            tokens[group.name] += len(read_NI)

        over_inputs(model, groups, batches, take)
        made = {}
        for group in groups:
            axis = next(axis for axis in group.axes if axis.silences)
            mean, square = moments[group.name] / tokens[group.name]
            made[group.name] = of_places((square - mean**2).clip(0) * columns(model, axis, 2), axis)
        return made
