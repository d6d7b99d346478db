"""α-β divergence: mode coverage and confidence, each by a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

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
        both = self.alpha + self.beta
        mixed_NV, student_NV = p_NV.pow(self.alpha).mul_(q_NV.pow(self.beta)), q_NV.pow(both)
        bound_NV = (p_NV.pow(both).mul_(self.alpha)).add_(student_NV, alpha=self.beta).div_(both)
        value_N = (bound_NV - mixed_NV).sum(-1) / (self.alpha * self.beta)
        return value_N, student_NV.sub_(mixed_NV).div_(self.alpha)
