"""The contract of an objective: weighted terms, each a value and a gradient per token.

Legend of this folder: N supervised tokens, V vocabulary, H hidden width, K categories kept of the vocabulary.
"""

from __future__ import annotations

from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from models.objectives.block import Block
from models.objectives.representation import RepresentationTerm


@runtime_checkable
class Term(Protocol):
    """One summand of an objective, worked on a chunk of tokens at a time.

    `add` returns the value per token in nats and adds the gradient where the block says. Values are true ones: a
    divergence is zero, with zero gradient, when student equals teacher. Both models' logits are already restricted to
    what they share, in fp32 or fp64. That is the shared vocabulary where the teacher's signal is dense; where it is
    sparse, or the teacher has another tokenizer, the columns are categories that a signal has made of it (see
    signal.py), and the term need not know.
    """

    name: ClassVar[str]
    needs_teacher: ClassVar[bool]

    def add(self, block: Block) -> Float[Tensor, " N"]: ...


@runtime_checkable
class Objective(Protocol):
    """What a stage minimises: the weighted sum of its terms over the supervised tokens.

    An objective never divides; the Lightning module divides once by the global number of supervised tokens.
    """

    @property
    def terms(self) -> list[tuple[float, Term]]:
        """On next-token logits, through the engine."""
        ...

    @property
    def representations(self) -> list[RepresentationTerm]:
        """On what the layers give; each knows its own weight."""
        ...


def needs_teacher(objective: Objective) -> bool:
    return bool(objective.representations) or any(term.needs_teacher for _, term in objective.terms)
