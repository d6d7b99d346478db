"""How much a unit's activation varies: what a unit adds that hardly varies could be a constant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import Batch, Statistics, columns, fed_by, of_places, over_inputs, tokens_of, wanted


@dataclass(frozen=True)
class Fluctuation:
    """Σ Var(x) · ‖w‖² over the columns by which a unit enters the next matrix, the variance over calibration tokens.

    FLAP, arXiv:2312.11983, without its standardisation between layers and the bias it leaves in a unit's place.
    """

    needs_calibration_data: ClassVar[bool] = True
    sees_experts: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp")

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        made = {"tokens": tokens_of(batch)}

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            made[group.name] = torch.stack([read_NI.sum(0), read_NI.square().sum(0)]).cpu().numpy()

        over_inputs(model, wanted(anatomy, kinds), batch, take)
        return made

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        made = {}
        for group in wanted(anatomy, kinds):
            axis = fed_by(group)
            mean, square = statistics[group.name] / max(1.0, float(statistics["tokens"][0]))
            made[group.name] = of_places((square - mean**2).clip(0) * columns(model, axis, 2), axis)
        return made
