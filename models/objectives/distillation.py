"""The seed loss of knowledge distillation: hard and soft labels in one sum."""

from __future__ import annotations

from dataclasses import dataclass

from models.objectives.cross_entropy import CrossEntropy
from models.objectives.term import Term


@dataclass(frozen=True)
class Distillation:
    """alpha · cross-entropy + (1 − alpha) · divergence; alpha = 1 is exactly the one, alpha = 0 exactly the other."""

    alpha: float
    divergence: Term

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: need [0, 1]; 0.5 weighs hard and soft labels alike")

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [(self.alpha, CrossEntropy()), (1 - self.alpha, self.divergence)]
