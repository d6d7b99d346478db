"""Adaptive KL: forward and reverse KL, weighed token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence, check_share


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """T² · (g · KL(p ‖ q) + (1 − g) · KL(q ‖ p)). AKL, arXiv:2404.02657.

    g is the part of Σ |p − q| that falls on the teacher's head, its likeliest tokens up to the cumulated probability
    `head`: forward KL is better at heads, reverse KL at tails. The weights are taken as constants: no gradient flows
    through g.
    """

    head: float = 0.5
    name: ClassVar[str] = "adaptive_kl"
    weighed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("head", self.head, "0.5 counts the likeliest tokens that make up half as the head")

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        gap_NV = (p_NV - q_NV).abs_()
        sorted_NV, order_NV = p_NV.sort(dim=-1, descending=True)
        in_head_NV = sorted_NV.cumsum(-1) <= self.head
        in_head_NV[:, 0] = True  # the likeliest token is head, however likely
        in_order_NV = gap_NV.gather(1, order_NV)
        head_N, all_N = (in_order_NV * in_head_NV).sum(-1), in_order_NV.sum(-1)
        forward_N1 = torch.where(all_N > 0, head_N / all_N.clamp_min(1e-30), 0.5)[:, None]
        value_N = torch.linalg.vecdot((1 - forward_N1) * q_NV - forward_N1 * p_NV, ratio_NV)
        return value_N, (1 - forward_N1) * (q_NV * ratio_NV) - forward_N1 * p_NV
