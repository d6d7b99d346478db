"""How near a student is to its teacher on the tokens that it learns from: measured beside an objective, not minimised.

Terms of factor 0: the engine asks them in the same pass over the logits, and nothing of theirs is in loss or gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.contexts import Contexts
from models.objectives.representation import RepresentationTerm
from models.objectives.signal import Dense, Signal, TopK
from models.objectives.term import Objective, Term


@dataclass(frozen=True)
class TopOneAgreement:
    """1 where student and teacher hold the same token for the likeliest, else 0."""

    name: ClassVar[str] = "top1_agreement"
    needs_teacher: ClassVar[bool] = True
    eager: ClassVar[bool] = True

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        return self.add_top(block, block.teacher_NV.argmax(-1))

    def add_top(self, block: Block, teacher_N: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
        """`teacher_N`: the teacher's likeliest tokens, where only some of its logits are known."""
        return (block.student_NV.argmax(-1) == teacher_N).double()


@dataclass(frozen=True)
class TeacherGap:
    """log p(target) − log q(target) of teacher's p and student's q, in nats: the student's cross-entropy less the
    teacher's. Below 0 where the student is the better one."""

    name: ClassVar[str] = "teacher_gap"
    needs_teacher: ClassVar[bool] = True
    eager: ClassVar[bool] = True

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        told = [
            logits_NV.gather(1, block.targets_N[:, None]).squeeze(1).double() - torch.logsumexp(logits_NV, -1).double()
            for logits_NV in (block.teacher_NV, block.student_NV)
        ]
        return told[0] - told[1]


@dataclass(frozen=True)
class Beside:
    """An objective, and what is measured in the same pass."""

    objective: Objective
    measured: Sequence[Term]

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [*self.objective.terms, *((0.0, term) for term in self.measured)]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return self.objective.representations


def with_nearness(objective: Objective, signal: Signal | None) -> Objective:
    """`objective` with what this signal can say of nearness: of a teacher's whole distribution both, of its likeliest
    tokens the agreement; nothing of draws, and of a teacher that has other tokens."""
    if isinstance(signal, Dense | Contexts):
        return Beside(objective, [TopOneAgreement(), TeacherGap()])
    return Beside(objective, [TopOneAgreement()]) if isinstance(signal, TopK) else objective
