"""Cross-entropy against the next token: the hard label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.objectives.block import Block
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

    def add(self, block: Block) -> Float[Tensor, " N"]:
        targets_N1, gradient_NV = block.targets_N[:, None], block.gradient_NV
        probabilities_NV, normaliser_N = softmax(block.student_NV)
        picked_N = block.student_NV.gather(1, targets_N1).squeeze(1)
        if block.weight:
            gradient_NV.add_(probabilities_NV, alpha=block.weight)
            gradient_NV.scatter_add_(1, targets_N1, gradient_NV.new_full((len(targets_N1), 1), -block.weight))
        return normaliser_N - picked_N
