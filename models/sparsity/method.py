"""Which weights become zero: the contract of conf/sparsity/*.yaml, and what the methods share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from models.errors import Refusal
from models.layerwise import Reading

# O outputs of a matrix, I its inputs


@dataclass(frozen=True)
class Pattern:
    """N:M, as NVIDIA writes it: of every M neighbouring inputs of an output N weights are kept, and M − N are zero."""

    kept: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        found = re.fullmatch(r"(\d+):(\d+)", str(text))
        if found is None or not 0 < int(found[1]) < int(found[2]):
            raise Refusal(f"sparsify.pattern={text}: need N:M with 0 < N < M; 2:4 keeps 2 of every 4 neighbours")
        return cls(int(found[1]), int(found[2]))

    def smallest(self, scores_OI: Tensor) -> Tensor:
        """Bool[O, I]: in every group the M − N with the smallest scores."""
        return smallest(scores_OI.unflatten(-1, (-1, self.of)), self.of - self.kept).flatten(-2)

    def held(self, weight_OI: Tensor) -> bool:
        return bool(((weight_OI != 0).unflatten(-1, (-1, self.of)).sum(-1) <= self.kept).all())


@runtime_checkable
class Method(Protocol):
    reading: Callable[[int], Reading] | None  # gathers statistics of a matrix's inputs; None: no text is needed

    def zeros(self, weights: Sequence[Tensor], fraction: float) -> list[int]:
        """How many weights of each matrix [O, I] become zero, where a fraction is asked for."""
        ...

    def sparsified(self, weight_OI: Tensor, zeros: int | Pattern, read: Any) -> Tensor:
        """The matrix with so many zeros, in float32 at least. `read`: the statistics of `reading`, or None."""
        ...


def same_share(weights: Sequence[Tensor], fraction: float) -> list[int]:
    return [round(fraction * weight.numel()) for weight in weights]


def smallest(scores: Tensor, count: int) -> Tensor:
    """Bool: exactly `count` along the last axis, the smallest, and of equal ones the first."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # torch.quantile ends at 16 M values, and kthvalue takes minutes where many are equal.
    last = scores.topk(count, largest=False, sorted=False).values.amax(-1, keepdim=True)
    below, equal = scores < last, scores == last
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1) <= room))


def at_least_float(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
