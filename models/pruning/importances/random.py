"""A baseline: units are scored at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from models.pruning.groups import KINDS, Anatomy
from models.pruning.importance import Batch, Statistics, wanted


@dataclass(frozen=True)
class Random:
    """A number of [0, 1) for each unit; of each group from the seed and the group's name alone."""

    seed: int = 0
    needs_calibration_data: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        return {}

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        return {
            group.name: np.random.default_rng([self.seed, *group.name.encode()]).random(group.units)
            for group in wanted(anatomy, kinds)
        }
