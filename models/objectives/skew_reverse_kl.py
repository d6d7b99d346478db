"""Skew reverse KL: of a student against a teacher that holds a share of the student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence, check_share, log_mix, only_where


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """T² · KL(q ‖ (1 − skew) · p + skew · q). DistiLLM, arXiv:2402.03898. Bounded by −log skew."""

    skew: float = 0.1
    name: ClassVar[str] = "skew_reverse_kl"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("skew", self.skew, "0.1 mixes 10 % of the student into the teacher")

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        log_NV = only_where(q_NV, log_mix(1 - self.skew, -ratio_NV)).neg_()  # log(q / m)
        value_N = torch.linalg.vecdot(q_NV, log_NV)
        share_NV = torch.sigmoid(ratio_NV + math.log(self.skew / (1 - self.skew)))  # skew · q / m
        return value_N, log_NV.sub_(share_NV).mul_(q_NV)
