"""A teacher that has seen more than the student: a signal from prompts of its own.

In-context distillation (arXiv:2212.10670) and context distillation (arXiv:2209.15189): the answer's tokens are the same
on both sides, and stand behind other prompts, so that their places differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.head import Head
from models.objectives.signal import Dense, Look


def in_students_order(
    hidden: Float[Tensor, "B Tt H"], teacher_targets: Int[Tensor, "B Tt"], targets: Int[Tensor, "B T"]
) -> Float[Tensor, "D N H"]:
    """The teacher's states that predict each of the student's N supervised tokens, once for each of its D prompts.

    Targets are -100 where nothing is supervised. A sequence holds its prompts one after another, so that the teacher's
    tokens come prompt by prompt, the student's once.
    """
    flat_MH = hidden[teacher_targets >= 0]
    counts_B = (targets >= 0).sum(1)
    total, own = len(flat_MH), int(counts_B.sum())
    draws = total // max(own, 1)
    if total != draws * own or not torch.equal((teacher_targets >= 0).sum(1), counts_B * draws):
        raise ValueError(f"the teacher's prompts lead to {total} tokens, and {own} are supervised")
    if draws <= 1:
        return flat_MH[None]
    row_N = torch.repeat_interleave(torch.arange(len(counts_B), device=hidden.device), counts_B)
    before_B = counts_B.cumsum(0) - counts_B  # supervised tokens of the rows before
    within_N = torch.arange(own, device=hidden.device) - before_B[row_N]
    first_N = draws * before_B[row_N] + within_N
    places_DN = first_N + torch.arange(draws, device=hidden.device)[:, None] * counts_B[row_N]
    return flat_MH[places_DN]


@dataclass(frozen=True)
class Contexts:
    """The mean of the teacher's distributions behind D prompts; of one prompt, that distribution itself.

    The mean is of probabilities at the temperature of the term that asks.
    """

    hidden_DNH: Float[Tensor, "D N H"]
    head: Head

    def at(self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Tensor, wide: torch.dtype) -> Look:
        if self.hidden_DNH.shape[1] != len(supervised_N):
            raise ValueError(
                f"the teacher's signal covers {self.hidden_DNH.shape[1]} tokens, and {len(supervised_N)} are supervised"
            )
        everywhere = torch.arange(len(supervised_N), device=supervised_N.device)
        looks = [Dense(hidden_NH, self.head).at(everywhere, vocabulary, like, wide) for hidden_NH in self.hidden_DNH]
        return looks[0] if len(looks) == 1 else _Mean(looks)


class _Mean:
    cuts = None

    def __init__(self, looks: list[Any]) -> None:
        self.looks = looks
        self.columns = sum(look.columns for look in looks) + looks[0].columns

    def open(self, chunk: slice) -> None:
        self.begin = chunk.start
        for look in self.looks:
            look.open(chunk)

    def add(self, term: Any, block: Block, tokens: slice) -> Tensor:
        temperature = getattr(term, "temperature", 1.0)
        part = slice(tokens.start - self.begin, tokens.stop - self.begin)
        mean_nV: Tensor | None = None
        for look in self.looks:
            log_nV = torch.log_softmax(look.logits_nV[part] / temperature, -1)
            mean_nV = log_nV if mean_nV is None else torch.logaddexp(mean_nV, log_nV)
        assert mean_nV is not None
        mean_nV = (mean_nV - math.log(len(self.looks))) * temperature
        values_n: Tensor = term.add(replace(block, teacher_NV=mean_nV))
        return values_n
