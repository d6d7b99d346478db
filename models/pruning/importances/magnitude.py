"""The L1 or L2 norm of a unit's weights: small weights matter little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from models.errors import Refusal
from models.pruning.groups import Anatomy
from models.pruning.importance import Batch, Statistics, Tally, check_reduction, wanted, weights_of
from models.sharding import gathered


@dataclass(frozen=True)
class Magnitude:
    """Σ |w|^power over each matrix's part of a unit, then `reduction` over the matrices (LLM-Pruner, arXiv:2305.11627).

    power 2 leaves the root out, as LLM-Pruner does: it would only matter between matrices.
    """

    power: int = 2
    reduction: str = "sum"
    needs_calibration_data: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp", "experts", "hidden")

    def __post_init__(self) -> None:
        if self.power not in (1, 2):
            raise Refusal(f"importance.power={self.power}: need 1 (L1) or 2 (L2)")
        check_reduction(self.reduction)

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        return {}

    @torch.no_grad()
    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        groups = wanted(anatomy, kinds)
        tally = Tally(groups)
        for name, weight in weights_of(model, groups).items():
            with gathered([weight]):
                tally.add(name, weight.abs().float() ** self.power)
        return tally.scores(self.reduction)
