"""Skew forward KL: against a student that already holds a share of the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence, check_share, log_mix, only_where


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """T² · KL(p ‖ skew · p + (1 − skew) · q). DistiLLM, arXiv:2402.03898.

    Bounded by −log skew: where the student says 0, the gradient stays small.
    """

    skew: float = 0.1
    name: ClassVar[str] = "skew_forward_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("skew", self.skew, "0.1 mixes 10 % of the teacher into the student")

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        value_N = -torch.linalg.vecdot(p_NV, only_where(p_NV, log_mix(1 - self.skew, ratio_NV)))
        # the student's share of the mixture, (1 − skew) q / m
        share_NV = torch.sigmoid(ratio_NV + math.log((1 - self.skew) / self.skew))
        return value_N, share_NV.mul_(p_NV).neg_()
