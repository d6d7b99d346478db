"""Total variation distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """T · ½ Σ |p − q|: the largest difference in probability of any event; symmetric, at most 1 (at T = 1).

    Wen et al., f-divergence minimisation for sequence-level distillation, arXiv:2307.15190. First order in a small
    difference, so T and not T² keeps the gradient's size.
    """

    name: ClassVar[str] = "total_variation"
    order: ClassVar[int] = 1

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        difference_NV = q_NV - p_NV
        return difference_NV.abs().sum(-1) / 2, difference_NV.sign_().mul_(q_NV).div_(2)
