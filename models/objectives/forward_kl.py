"""Forward KL: the soft label of knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.divergence import Divergence, only_where
from models.objectives.softmax import softmax


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """T² · KL(p ‖ q), teacher against student: mode-covering.

    Hinton et al., arXiv:1503.02531. As T grows the value tends to half the variance over the vocabulary of the
    difference of logits.
    """

    temperature: float = 2.0
    name: ClassVar[str] = "forward_kl"

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        return -torch.linalg.vecdot(p_NV, only_where(p_NV, ratio_NV)), -p_NV

    def add(self, block: Block) -> Float[Tensor, " N"]:
        """As `of` says, with fewer passes over the block: this is the divergence most runs use."""
        assert block.teacher_NV is not None
        temperature = self.temperature
        student_NV, teacher_NV = block.student_NV / temperature, block.teacher_NV / temperature
        q_NV, student_normaliser_N = softmax(student_NV)
        p_NV, teacher_normaliser_N = softmax(teacher_NV)
        # Σ p · (log p − log q), the normalisers taken out of the sum
        value_N = torch.linalg.vecdot(p_NV, only_where(p_NV, teacher_NV.sub_(student_NV)))
        value_N = (value_N + student_normaliser_N - teacher_normaliser_N) * temperature**2
        if block.weight:
            # d/d logits of T²·KL(p ‖ q) at logits / T is T · (q − p)
            block.gradient_NV.add_(q_NV.sub_(p_NV), alpha=block.weight * temperature)
        return value_N

    def add_sampled(
        self,
        block: Block,
        ids_NK: Int[Tensor, "N K"],
        shares_NK: Float[Tensor, "N K"],
        negentropy_N: Float[Tensor, " N"],
    ) -> Float[Tensor, " N"]:
        """The same against an unbiased estimate of p, nonzero at few tokens.

        Forward KL is linear in p but for p's own entropy, which is given exactly (Σ p log p); so value and gradient
        are right in expectation (arXiv:2503.16870). Of no other divergence here does that hold.
        """
        temperature = self.temperature
        student_NV = block.student_NV / temperature
        q_NV, normaliser_N = softmax(student_NV)
        expected_N = torch.linalg.vecdot(shares_NK, only_where(shares_NK, student_NV.gather(1, ids_NK)))
        value_N = (negentropy_N + shares_NK.sum(-1) * normaliser_N - expected_N) * temperature**2
        if block.weight:
            block.gradient_NV.add_(q_NV, alpha=block.weight * temperature)
            block.gradient_NV.scatter_add_(1, ids_NK, shares_NK * (-block.weight * temperature))
        return value_N
