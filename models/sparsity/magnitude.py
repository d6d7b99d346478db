"""Magnitude: the smallest weights become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.sparsity.method import Pattern, same_share, smallest


@dataclass(frozen=True)
class Magnitude:
    """What is below the quantile of |w| becomes zero, of every matrix or (`scope: global`) of all together.

    Exactly the fraction, also where weights are equal. N:M has groups, and so no scope.
    """

    scope: str = "layer"
    reading: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.scope not in ("layer", "global"):
            raise Refusal(f"sparsity.scope={self.scope}: need layer (each matrix by itself) or global")

    def zeros(self, weights: Sequence[Tensor], fraction: float) -> list[int]:
        if self.scope == "layer":
            return same_share(weights, fraction)
        count = round(fraction * sum(weight.numel() for weight in weights))
        # Bisection over the bits of |w|, which are in the order of its values: exact, and no copy of all weights.
        low, high = 0, torch.iinfo(torch.int32).max
        while low < high:
            middle = (low + high) // 2
            if sum(int((_bits(weight) <= middle).sum()) for weight in weights) >= count:
                high = middle
            else:
                low = middle + 1
        found = [int((_bits(weight) < low).sum()) for weight in weights]
        for at, weight in enumerate(weights):
            found[at] += min(count - sum(found), int((_bits(weight) == low).sum()))
        return found

    def sparsified(self, weight_OI: Tensor, zeros: int | Pattern, read: Any) -> Tensor:
        size_OI = weight_OI.abs().float()
        if isinstance(zeros, Pattern):
            gone = zeros.smallest(size_OI)
        else:
            gone = smallest(size_OI.flatten(), zeros).view_as(size_OI)
        return weight_OI.masked_fill(gone, 0)


def _bits(weight: Tensor) -> Tensor:
    return weight.abs().float().contiguous().view(torch.int32)
