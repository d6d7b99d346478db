"""Any divergence, over the teacher's k likeliest tokens and one bucket for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from models.objectives.block import Block
from models.objectives.buckets import add_in_buckets, tail_of
from models.objectives.divergence import Divergence
from models.objectives.representation import RepresentationTerm
from models.objectives.term import Term


@dataclass(frozen=True)
class TopK:
    """`divergence` over k + 1 categories: the same that a cache of top-k log-probabilities gives."""

    k: int
    divergence: Divergence
    name: ClassVar[str] = "top_k"
    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k={self.k}: need at least 1 token; 64 holds most of what a teacher says")

    @property
    def temperature(self) -> float:
        return self.divergence.temperature

    @property
    def weight(self) -> float:
        return self.divergence.weight

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(self.weight, self)]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return []

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        if self.k >= block.teacher_NV.shape[1]:
            return self.divergence.add(block)
        teacher_NK, ids_NK = block.teacher_NV.topk(self.k, dim=-1)
        tail_N = tail_of(block.teacher_NV, ids_NK, self.temperature)
        return add_in_buckets(self.divergence, block, ids_NK, teacher_NK, tail_N)
