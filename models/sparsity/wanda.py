"""Wanda: in each output the weights with the smallest |w| · ‖x‖ become zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.sparsity.method import Pattern, at_least_float, same_share, smallest


class Norms:
    """‖x‖₂ of every input, over all tokens: Float64[I]."""

    def __init__(self, width: int) -> None:
        self.squares_I: Tensor = torch.zeros(width, dtype=torch.float64)

    def add(self, read_NI: Tensor) -> None:
        self.squares_I = self.squares_I.to(read_NI.device) + read_NI.double().square().sum(0)


@dataclass(frozen=True)
class Wanda:
    """Every output loses the same share of its inputs, those of the smallest |w| · ‖x‖₂. No weight changes otherwise.

    arXiv:2306.11695. Where the share of an output is no whole number, the first ones lose one more.
    """

    reading: ClassVar[type[Norms]] = Norms

    def zeros(self, weights: Sequence[Tensor], fraction: float) -> list[int]:
        return same_share(weights, fraction)

    def sparsified(self, weight_OI: Tensor, zeros: int | Pattern, read: Any) -> Tensor:
        sizes_OI = at_least_float(weight_OI.abs())  # norms of half precision would overflow
        scores_OI = sizes_OI * read.squares_I.sqrt().to(sizes_OI)
        if isinstance(zeros, Pattern):
            return weight_OI.masked_fill(zeros.smallest(scores_OI), 0)
        each, more = divmod(zeros, len(weight_OI))
        gone = torch.cat([smallest(scores_OI[:more], each + 1), smallest(scores_OI[more:], each)])
        return weight_OI.masked_fill(gone, 0)
