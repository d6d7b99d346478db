"""What all divergences between next-token distributions have in common: temperature, and the way to the logits."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.block import Block
from models.objectives.representation import RepresentationTerm
from models.objectives.softmax import softmax
from models.objectives.term import Term


@dataclass(frozen=True)
class Divergence(ABC):
    """T² · D(p, q) of the teacher's p = softmax(teacher / T) and the student's q = softmax(student / T), in nats.

    The T² keeps the gradient's size when T changes (Hinton et al., arXiv:1503.02531).

    A new divergence is a frozen dataclass with a `name`, `of` (its value, and its derivative by log q) and, where it is
    not of second order, `order`; and a conf/divergence/<name>.yaml. tests/objectives/test_divergences.py takes its
    list from there, and so tests what is promised of every divergence: it is positive, and 0 with gradient 0 where
    p = q, at every temperature and in low precision; its gradient is that of its value, unless `weighed` says that a
    factor of it is taken as constant; logits far apart give numbers; it is worked out by blocks as all at once.
    """

    temperature: float = 1.0
    weight: float = 1.0  # of this term in the objective it is part of

    name: ClassVar[str]
    needs_teacher: ClassVar[bool] = True
    order: ClassVar[int] = 2  # of the divergence in a small difference of p and q: the power of T that offsets T
    any_vocabulary: ClassVar[bool] = False  # True: `add` takes a teacher whose columns are other tokens
    weighed: ClassVar[bool] = False  # True: a factor of the value is a constant to the gradient, by definition

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: need a number above 0; 2 is usual")
        if not (self.weight >= 0 and math.isfinite(self.weight)):
            raise ValueError(f"weight={self.weight}: need a number of at least 0; 1 leaves the term as it is")

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(self.weight, self)]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return []

    @abstractmethod
    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        """D(p, q) per token, and q · ∂D/∂q up to a multiple of q, which the softmax takes out again.

        `ratio_NV` is log q − log p, taken from the logits: small differences and small probabilities keep their digits.
        Where a logit is −inf it is infinite (0 where both are), and 0 · log 0 is 0: `only_where` leaves it out.
        """

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        temperature = self.temperature
        student_NV, teacher_NV = block.student_NV / temperature, block.teacher_NV / temperature
        q_NV, student_normaliser_N = softmax(student_NV)
        p_NV, teacher_normaliser_N = softmax(teacher_NV)
        shift_N = (student_normaliser_N - teacher_normaliser_N).to(student_NV.dtype)
        # A logit of −inf in both is no column at all; NaN elsewhere is in p or q, too.
        ratio_NV = student_NV.sub_(teacher_NV).sub_(shift_N[:, None]).nan_to_num_(0.0, math.inf, -math.inf)
        value_N, slope_NV = self.of(p_NV, q_NV, ratio_NV)
        if block.weight:
            slope_NV = slope_NV.addcmul(q_NV, slope_NV.sum(-1, keepdim=True), value=-1)
            block.gradient_NV.add_(slope_NV, alpha=block.weight * temperature ** (self.order - 1))
        return value_N * temperature**self.order


def log_mix(share: float, ratio_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """log(1 − share + share · e^ratio): zero at ratio zero, to the bit, and without overflow."""
    beyond_NV = (ratio_NV - 60.0).clamp_(min=0.0)
    return torch.log1p(share * torch.expm1(ratio_NV.clamp(max=60.0))).add_(beyond_NV)


def only_where(p_NV: Float[Tensor, "N V"], log_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
    """`log_NV`, changed in place to 0 where p is: what p is multiplied with may be infinite there."""
    return log_NV.masked_fill_(p_NV == 0, 0.0)


def check_share(name: str, value: float, meaning: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value}: need a number between 0 and 1; {meaning}")
