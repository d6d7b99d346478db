"""Forward KL: the soft label of knowledge distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.softmax import softmax
from models.objectives.term import Term


@dataclass(frozen=True)
class ForwardKL:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), mode-covering, in nats.

    Hinton et al., arXiv:1503.02531. The T² keeps the gradient's size when T changes; as T grows the value tends to
    half the variance over the vocabulary of the difference of logits.
    """

    temperature: float = 2.0
    name: ClassVar[str] = "forward_kl"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: need a number above 0; 2 is usual")

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(1.0, self)]

    def add(
        self,
        student_NV: Float[Tensor, "N V"],
        teacher_NV: Float[Tensor, "N V"] | None,
        targets_N: Int[Tensor, " N"],
        weight: float,
        gradient_NV: Float[Tensor, "N V"],
    ) -> Float[Tensor, " N"]:
        assert teacher_NV is not None
        temperature = self.temperature
        student_NV, teacher_NV = student_NV / temperature, teacher_NV / temperature
        student_p_NV, student_normaliser_N = softmax(student_NV)
        teacher_p_NV, teacher_normaliser_N = softmax(teacher_NV)
        # Σ p · (log p − log q), the normalisers taken out of the sum
        value_N = torch.linalg.vecdot(teacher_p_NV, teacher_NV.sub_(student_NV))
        value_N = (value_N + student_normaliser_N - teacher_normaliser_N) * temperature**2
        if weight:
            # d/d logits of T²·KL(p ‖ q) at logits / T is T · (q − p)
            gradient_NV.add_(student_p_NV.sub_(teacher_p_NV), alpha=weight * temperature)
        return value_N
