"""α-β divergence: mode coverage and confidence, each by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """−T² / (αβ) · Σ (p^α q^β − α/(α+β) · p^(α+β) − β/(α+β) · q^(α+β)). ABKD, arXiv:2505.04560.

    α → 1, β → 0 is forward KL; α → 0, β → 1 reverse KL; α = β = 1 half the squared distance; α = β = ½ four times the
    squared Hellinger distance. A larger α follows the teacher's likely tokens more, a larger β leaves the student its
    own. Both above 0: the limits are divergences of their own.
    """

    alpha: float = 0.2
    beta: float = 0.7
    name: ClassVar[str] = "alpha_beta"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, limit in (("alpha", "reverse_kl"), ("beta", "forward_kl")):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)}: need a number above 0; the limit is {limit}")

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        # With d = −|ratio| all powers are of the larger of p and q times e^(multiples of d): nothing overflows, and
        # where p = q everything is 0 to the bit.
        both, falls_NV = self.alpha + self.beta, ratio_NV.abs().neg_()
        ahead_NV = ratio_NV >= 0  # the student's is the larger
        power_NV = torch.where(ahead_NV, p_NV.new_tensor(self.alpha), p_NV.new_tensor(self.beta))
        whole_NV, part_NV = torch.expm1(falls_NV * both), torch.expm1(falls_NV * power_NV)
        larger_NV = torch.maximum(p_NV, q_NV).pow_(both)
        value_N = torch.linalg.vecdot(larger_NV, power_NV * (whole_NV / both) - part_NV) / (self.alpha * self.beta)
        return value_N, larger_NV * whole_NV.masked_fill_(ahead_NV, 0).sub_(part_NV) / self.alpha
