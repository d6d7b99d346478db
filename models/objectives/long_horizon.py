"""What a token of the student's own does to all that comes after it: the policy gradient beside the reverse KL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.head import Head
from models.objectives.representation import RepresentationTerm
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Signal
from models.objectives.softmax import softmax
from models.objectives.term import Objective, Term


def long_horizon_sum(
    objective: Objective,
    hidden: Float[Tensor, "B T H"],
    head: Head,
    targets: Int[Tensor, "B T"],
    signal: Signal | None = None,
    *,
    length_normalised: bool,
    weights: Float[Tensor, "B T"] | None = None,
    compiled: bool = False,
    **engine: Any,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """As `objective_sum`, on sequences of one student's text each, with the rest of the sequence's gradient.

    The reverse KL of sequences drawn from the student q is a sum over tokens of log q / p, p the teacher. Its gradient
    has a part for each token's own distribution, which is the term reverse_kl of the objective, and one for what the
    token does to the later ones, Σ_t C_t ∇ log q(y_t) with C_t the sum of log q / p after t. This adds the second, with
    the weight of the first; to the gradient only, as it has no value of its own. `length_normalised` divides C_t by the
    number of its tokens. MiniLLM, arXiv:2306.08543, section 2.2; left out are its clipping, which belongs to several
    updates from one text, and its teacher-mixed sampling: where the student writes alone the importance weights are 1.

    Raises ValueError where the objective has no reverse_kl. No [tokens × vocabulary] tensor exists.
    """
    factor = sum(weight for weight, term in objective.terms if isinstance(term, ReverseKL))
    if not factor:
        raise ValueError("the long horizon belongs to reverse_kl, which the objective does not have")
    ratio = _LogRatio()
    seen = _With(objective, ratio)
    total, parts = objective_sum(seen, hidden, head, targets, signal, weights=weights, compiled=compiled, **engine)
    del parts[ratio.name]
    later_BT = later(ratio.placed(targets >= 0), targets >= 0, length_normalised)
    weights_BT = -factor * (later_BT if weights is None else later_BT * weights)
    # Cross-entropy is -log q: weighted with -C its gradient is C ∇ log q.
    pull, _ = objective_sum(CrossEntropy(), hidden, head, targets, weights=weights_BT, compiled=compiled, **engine)
    return total + (pull - pull.detach()), parts


def later(values_BT: Float[Tensor, "B T"], counted_BT: Bool[Tensor, "B T"], mean: bool) -> Float[Tensor, "B T"]:
    """Sum, or mean, of the counted values behind each place of its row; 0 where none is left."""
    values_BT = values_BT * counted_BT
    sums_BT = values_BT.flip(1).cumsum(1).flip(1) - values_BT
    if not mean:
        return sums_BT
    counts_BT = counted_BT.flip(1).cumsum(1).flip(1) - counted_BT.long()
    return sums_BT / counts_BT.clamp(min=1)


@dataclass(eq=False)
class _LogRatio:
    """log q / p of the target alone. It has no gradient, and remembers every token's value: the engine keeps sums."""

    name: ClassVar[str] = "log_ratio"
    needs_teacher: ClassVar[bool] = True
    eager: ClassVar[bool] = True  # compiled, it could not remember
    values: list[Tensor] = field(default_factory=list)

    def add(self, block: Block) -> Float[Tensor, " N"]:
        assert block.teacher_NV is not None
        student_N, teacher_N = (
            logits_NV.gather(1, block.targets_N[:, None]).squeeze(1) - softmax(logits_NV)[1]
            for logits_NV in (block.student_NV, block.teacher_NV)
        )
        self.values.append(student_N - teacher_N)
        return self.values[-1]

    def placed(self, supervised_BT: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """The values, where their tokens are predicted; 0 elsewhere."""
        if not self.values:
            return torch.zeros(supervised_BT.shape, device=supervised_BT.device)
        values_N = torch.cat(self.values)
        return values_N.new_zeros(supervised_BT.shape).masked_scatter(supervised_BT, values_N)


@dataclass(frozen=True)
class _With:
    """An objective, and a term that only looks on."""

    objective: Objective
    term: Term

    @property
    def terms(self) -> list[tuple[float, Term]]:
        return [*self.objective.terms, (0.0, self.term)]

    @property
    def representations(self) -> list[RepresentationTerm]:
        return self.objective.representations
