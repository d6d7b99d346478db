"""Universal logit distillation: distributions over different vocabularies, compared by rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.block import Block
from models.objectives.divergence import Divergence
from models.objectives.softmax import softmax


@dataclass(frozen=True)
class UniversalLogit(Divergence):
    """T · Σ |sort(p) − sort(q)|, both descending, the shorter one filled up with zeros. ULD, arXiv:2402.12030.

    The Wasserstein distance between the two when every token is as far from every other. It needs no common
    vocabulary, and sees no token's identity either: two opposite distributions can be at distance 0. Where teacher and
    student tokenize the same bytes alike, the span-aligned divergences see more.
    """

    name: ClassVar[str] = "universal_logit"
    order: ClassVar[int] = 1
    any_vocabulary: ClassVar[bool] = True  # a signal of another tokenizer hands it the two models' own columns

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        return self._ranked(p_NV, q_NV)

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        q_NV, _ = softmax(block.student_NV / self.temperature)
        p_NV, _ = softmax(block.teacher_NV / self.temperature)
        value_N, slope_NV = self._ranked(p_NV, q_NV)
        if block.weight:
            slope_NV = slope_NV.addcmul(q_NV, slope_NV.sum(-1, keepdim=True), value=-1)
            block.gradient_NV.add_(slope_NV, alpha=block.weight)
        return value_N * self.temperature

    def _ranked(
        self, p_NV: Float[Tensor, "N Vt"], q_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        p_NV = p_NV.sort(dim=-1, descending=True).values
        q_sorted_NV, order_NV = q_NV.sort(dim=-1, descending=True)
        width = max(p_NV.shape[1], q_NV.shape[1])
        p_NV, filled_NV = (torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in (p_NV, q_sorted_NV))
        difference_NV = filled_NV - p_NV
        slope_NV = torch.empty_like(q_NV).scatter_(1, order_NV, difference_NV.sign()[:, : q_NV.shape[1]])
        return difference_NV.abs().sum(-1), slope_NV.mul_(q_NV)
