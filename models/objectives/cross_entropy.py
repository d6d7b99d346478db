"""Cross-entropy against the next token: the hard label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.representation import RepresentationTerm
from models.objectives.softmax import softmax
from models.objectives.term import Term


@dataclass(frozen=True)
class CrossEntropy:
    """-log softmax(student)[target], in nats."""

    name: ClassVar[str] = "cross_entropy"
    needs_teacher: ClassVar[bool] = False

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(1.0, self)]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return []

    def add(
        self,
        student_NV: Float[Tensor, "N V"],
        teacher_NV: Float[Tensor, "N V"] | None,
        targets_N: Int[Tensor, " N"],
        weight: float,
        gradient_NV: Float[Tensor, "N V"],
    ) -> Float[Tensor, " N"]:
        probabilities_NV, normaliser_N = softmax(student_NV)
        picked_N = student_NV.gather(1, targets_N[:, None]).squeeze(1)
        if weight:
            gradient_NV.add_(probabilities_NV, alpha=weight)
            gradient_NV.scatter_add_(1, targets_N[:, None], gradient_NV.new_full((len(targets_N), 1), -weight))
        return normaliser_N - picked_N
