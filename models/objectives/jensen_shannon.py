"""Generalised Jensen–Shannon divergence: between the two KLs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence, log_mix, only_where
from models.objectives.forward_kl import ForwardKL
from models.objectives.reverse_kl import ReverseKL


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """T² · (β KL(p ‖ m) + (1 − β) KL(q ‖ m)), m = βp + (1 − β)q. GKD, arXiv:2306.13649.

    Bounded, unlike the KLs. β = 0 is forward KL and β = 1 reverse KL, as others have it: these are the limits of
    JSD / β and JSD / (1 − β), while JSD itself tends to 0 there. So a small β also means a small gradient.
    """

    beta: float = 0.5
    name: ClassVar[str] = "jensen_shannon"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta}: need [0, 1]; 0.5 treats teacher and student alike")

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        if self.beta in (0, 1):
            return (ReverseKL if self.beta else ForwardKL)().of(p_NV, q_NV, ratio_NV)
        teacher_N = -torch.linalg.vecdot(p_NV, only_where(p_NV, log_mix(1 - self.beta, ratio_NV)))
        slope_NV = q_NV * only_where(q_NV, log_mix(self.beta, -ratio_NV)).mul_(self.beta - 1)
        return self.beta * teacher_N + slope_NV.sum(-1), slope_NV
