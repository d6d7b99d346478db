"""What a teacher says of the next tokens, in the forms it can come in.

A signal stands beside the student's tokens; `at` turns it to the supervised ones and gives the engine a `Look`, which
knows how to put each chunk of it beside the student's logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.buckets import add_in_buckets
from models.objectives.head import Head, product_dtype


@runtime_checkable
class Look(Protocol):
    """A signal at the N supervised tokens of one call."""

    @property
    def cuts(self) -> Sequence[bool] | None:
        """Before which of the tokens a chunk may begin; None: before any."""
        ...

    @property
    def columns(self) -> int:
        """Logits a token that are held for the teacher, beside the student's."""
        ...

    def open(self, chunk: slice) -> None:
        """Make ready for the tokens of `chunk`; what the one before needed may go."""
        ...

    def add(self, term: Any, block: Block, tokens: slice) -> Float[Tensor, " n"]:
        """As `Term.add`, for `tokens` of the open chunk; `term` is one that needs a teacher, which `block` lacks."""
        ...


@runtime_checkable
class Signal(Protocol):
    def at(
        self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Float[Tensor, "V H"], wide: torch.dtype
    ) -> Look:
        """`supervised_N`: flat positions. `vocabulary`: columns that stand for tokens. `like`: the student's head."""
        ...


@dataclass(frozen=True)
class Dense:
    """The teacher's hidden states and its head: exact over the whole vocabulary."""

    hidden: Float[Tensor, "*tokens Ht"]
    head: Head

    def at(self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Tensor, wide: torch.dtype) -> Look:
        hidden_NH = self.hidden.detach().reshape(-1, self.hidden.shape[-1]).index_select(0, supervised_N)
        hidden_NH = hidden_NH.to(product_dtype(hidden_NH))  # rounded as the student's: zero where they are equal
        head = self.head.restricted(vocabulary, hidden_NH.dtype)
        columns = min(len(like), vocabulary or len(like))
        if len(head.weight) != columns:
            raise ValueError(
                f"student head has {columns} columns and teacher head {len(head.weight)}: "
                f"pass vocabulary, the number of tokens that both tokenizers share"
            )
        return _DenseLook(hidden_NH, head, wide)


class _DenseLook:
    cuts = None

    def __init__(self, hidden_NH: Tensor, head: Head, wide: torch.dtype) -> None:
        self.hidden_NH, self.head, self.wide = hidden_NH, head, wide
        self.columns = len(head.weight)
        self.buffer: Tensor | None = None

    def open(self, chunk: slice) -> None:
        hidden_nH = self.hidden_NH[chunk]
        if self.buffer is None or len(self.buffer) < len(hidden_nH):  # written over by every chunk
            self.buffer = hidden_nH.new_empty(len(hidden_nH), self.columns, dtype=self.wide)
        self.begin = chunk.start
        self.logits_nV = self.head.write_logits(hidden_nH, self.buffer[: len(hidden_nH)])

    def add(self, term: Any, block: Block, tokens: slice) -> Tensor:
        logits_nV = self.logits_nV[tokens.start - self.begin : tokens.stop - self.begin]
        values_n: Tensor = term.add(replace(block, teacher_NV=logits_nV))
        return values_n


@dataclass(frozen=True)
class TopK:
    """The k largest logits of each supervised token, and T · log Σ exp(logit / T) of the rest for some temperatures.

    With k = V there is no rest (`tails` is empty) and the signal is exact.
    """

    ids_NK: Int[Tensor, "N K"]
    logits_NK: Float[Tensor, "N K"]
    tails: dict[float, Float[Tensor, " N"]]

    def at(self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Tensor, wide: torch.dtype) -> Look:
        _check_count(len(self.ids_NK), len(supervised_N))
        return _TopKLook(self.ids_NK, self.logits_NK.to(wide), {t: tail.to(wide) for t, tail in self.tails.items()})


class _TopKLook:
    cuts, columns = None, 0

    def __init__(self, ids_NK: Tensor, logits_NK: Tensor, tails: dict[float, Tensor]) -> None:
        self.ids_NK, self.logits_NK, self.tails = ids_NK, logits_NK, tails

    def open(self, chunk: slice) -> None:
        """All is there."""

    def add(self, term: Any, block: Block, tokens: slice) -> Tensor:
        if hasattr(term, "add_top"):
            likeliest_N1 = self.logits_NK[tokens].argmax(-1, keepdim=True)
            top_n: Tensor = term.add_top(block, self.ids_NK[tokens].gather(1, likeliest_N1).squeeze(1))
            return top_n
        tail_N = None
        if self.tails:
            if term.temperature not in self.tails:
                known = ", ".join(f"{t:g}" for t in self.tails)
                raise ValueError(f"temperature={term.temperature:g}: the signal was recorded for {known}")
            tail_N = self.tails[term.temperature][tokens]
        return add_in_buckets(term, block, self.ids_NK[tokens], self.logits_NK[tokens], tail_N)


@dataclass(frozen=True)
class Sampled:
    """Tokens drawn from the teacher at one temperature: an unbiased estimate of its distribution.

    Sparse Logit Sampling, arXiv:2503.16870, drawing from the distribution itself: a token's share is the fraction of
    draws that hit it. Filled up with share 0. `negentropy_N` is the exact Σ p log p.
    """

    ids_NK: Int[Tensor, "N K"]
    shares_NK: Float[Tensor, "N K"]
    negentropy_N: Float[Tensor, " N"]
    temperature: float

    def at(self, supervised_N: Int[Tensor, " N"], vocabulary: int | None, like: Tensor, wide: torch.dtype) -> Look:
        _check_count(len(self.ids_NK), len(supervised_N))
        return _SampledLook(self, wide)


class _SampledLook:
    cuts, columns = None, 0

    def __init__(self, signal: Sampled, wide: torch.dtype) -> None:
        self.signal, self.wide = signal, wide

    def open(self, chunk: slice) -> None:
        """All is there."""

    def add(self, term: Any, block: Block, tokens: slice) -> Tensor:
        signal = self.signal
        if not hasattr(term, "add_sampled") or term.temperature != signal.temperature:
            raise ValueError(
                f"{term.name}, temperature={getattr(term, 'temperature', 1):g}: a sampled signal serves forward_kl at "
                f"the temperature it was recorded at, {signal.temperature:g}"
            )
        values_n: Tensor = term.add_sampled(
            block,
            signal.ids_NK[tokens],
            signal.shares_NK[tokens].to(self.wide),
            signal.negentropy_N[tokens].to(self.wide),
        )
        return values_n


def _check_count(given: int, supervised: int) -> None:
    if given != supervised:
        raise ValueError(f"the teacher's signal covers {given} tokens, and {supervised} are supervised")
