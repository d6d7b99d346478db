"""The loss of knowledge distillation: hard and soft labels, and whatever else, in one sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from models.objectives.cross_entropy import CrossEntropy
from models.objectives.representation import RepresentationTerm
from models.objectives.term import Term


@dataclass(frozen=True)
class Distillation:
    """alpha · cross-entropy + (1 − alpha) · divergence, and each of `also` times its own weight.

    alpha = 1 is exactly the one, alpha = 0 exactly the other. `also`: further divergences, or terms on hidden states
    and attention, by a name of one's choice.
    """

    alpha: float
    divergence: Any  # a Term with a weight
    also: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: need [0, 1]; 0.5 weighs hard and soft labels alike")
        names = [term.name for _, term in self.terms] + [term.name for term in self.representations]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"objective: two terms are named {twice[0]}; use different ones, or one with more weight")

    @property
    def terms(self) -> list[tuple[float, Term]]:
        more = [(term.weight, term) for term in self.also.values() if not isinstance(term, RepresentationTerm)]
        if self.alpha == 1:  # no teacher is asked then, nor loaded
            return [(1.0, CrossEntropy()), *more]
        return [(self.alpha, CrossEntropy()), ((1 - self.alpha) * self.divergence.weight, self.divergence), *more]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return [term for term in self.also.values() if isinstance(term, RepresentationTerm)]
