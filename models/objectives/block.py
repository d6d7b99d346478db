"""A block of tokens as the terms of an objective see it: both models' logits, and where the gradient goes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """N tokens. A term adds `weight` times its gradient by `student_NV` into `gradient_NV`; with weight 0 nobody reads
    that gradient, and a term may leave it out.

    `teacher_NV` is None where no teacher is asked. It has the student's V columns, but for a term that takes any
    vocabulary (`Divergence.any_vocabulary`).
    """

    student_NV: Float[Tensor, "N V"]
    targets_N: Int[Tensor, " N"]
    weight: float
    gradient_NV: Float[Tensor, "N V"]
    teacher_NV: Float[Tensor, "N Vt"] | None = None
