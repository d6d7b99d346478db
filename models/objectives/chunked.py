"""From hidden states and heads to loss and gradients, a chunk of tokens at a time.

The logits of a large vocabulary are the largest tensor of a training step: 8192 tokens × 128k × 4 bytes are 4 GiB, and
student, teacher, softmax and gradient want one each. Here no [tokens × vocabulary] tensor exists: each chunk's logits
are made, turned into values and gradients by the objective's terms in one pass, and dropped. Sums are kept in fp32
(fp64 for fp64 inputs) whatever the model's dtype.

Chunks are of tokens; the terms work on smaller blocks of them, which a CPU's caches hold. The vocabulary is not cut:
a softmax needs all of a row, so that blocks of columns would take every product twice.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.head import Head, product_dtype
from models.objectives.signal import Look, Signal
from models.objectives.term import Objective
from models.targets import IGNORED

# What the buffers of one chunk may take by themselves, in bytes: the matrix products, which sweep the whole head for
# every chunk, want it large; more than a sixteenth of the tokens at once would give the memory away again.
_BUDGET = {"cpu": 96 * 2**20, "cuda": 1024 * 2**20}
_CHUNK_TOKENS = 128  # and at least these, however large the vocabulary
# Logits of one block, on which the terms work: small enough for a CPU's caches, large enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 32 * 2**20}

_forecast_of: str | None = None  # the kind of device whose budgets are taken, whatever the tensors are on


@contextmanager
def as_on(kind: str) -> Iterator[None]:
    """In it the engine takes the buffers that it would take on a device of this kind, cpu or cuda: for a forecast."""
    global _forecast_of
    before, _forecast_of = _forecast_of, kind
    try:
        yield
    finally:
        _forecast_of = before


def objective_sum(
    objective: Objective,
    hidden: Float[Tensor, "*tokens H"],
    head: Head,
    targets: Int[Tensor, "*tokens"],
    signal: Signal | None = None,
    *,
    weights: Float[Tensor, "*tokens"] | None = None,
    vocabulary: int | None = None,
    memory_bytes: int | None = None,
    chunk_tokens: int | None = None,
    compiled: bool = False,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sum of the objective's terms over tokens whose target is not -100, and the detached sum of each of its terms.

    `weights`: of each token's value, in the sums and the gradients; none are all 1. `vocabulary`: number of columns
    that stand for tokens; those beyond are as if they were not there. `memory_bytes`: what the buffers of a chunk may
    take (`chunk_tokens` says how many tokens instead); None chooses. `compiled`: terms through torch.compile.
    The sum is differentiable by `hidden` and the head's tensors, once: the gradients are ready by then, and a second
    backward would find them used up. The teacher gets no gradient.
    """
    supervised_N = (targets != IGNORED).reshape(-1).nonzero().squeeze(1)
    flat_NH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, supervised_N)
    if compiled:
        objective = _Compiled(objective)
    look = None
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if any(term.needs_teacher for _, term in objective.terms):
        if signal is None:
            raise ValueError("the objective has a term that needs a teacher, and none was given")
        with torch.no_grad():
            look = signal.at(supervised_N, vocabulary, head.weight, wide)
    if look is not None and look.cuts is not None and weights is not None:
        weights_N = weights.reshape(-1)[supervised_N]
        if any(not cut and a != b for cut, a, b in zip(look.cuts[1:], weights_N[:-1], weights_N[1:], strict=False)):
            raise ValueError("the tokens of a span have different weights; what is compared is the span as a whole")
    low_Nr = None if head.adapter is None else head.adapter.down(flat_NH)
    work = _Work(
        objective,
        head,
        look,
        targets.reshape(-1)[supervised_N],
        None if weights is None else weights.reshape(-1)[supervised_N].to(wide),
        vocabulary,
        memory_bytes,
        chunk_tokens,
        wide,
        torch.is_grad_enabled(),
    )
    up = None if head.adapter is None else head.adapter.up
    total, *parts = _Chunked.apply(flat_NH, head.weight, head.bias, low_Nr, up, work)
    return total, dict(zip((term.name for _, term in objective.terms), parts, strict=True))


@dataclass
class _Work:
    """Everything of a call that autograd need not see."""

    objective: Objective
    head: Head
    look: Look | None
    targets_N: Tensor
    weights_N: Tensor | None
    vocabulary: int | None
    memory_bytes: int | None
    chunk_tokens: int | None
    wide: torch.dtype
    differentiate: bool  # inside the function autograd is off, and needs_input_grad does not know of no_grad


class _Compiled:
    """An objective whose terms run through torch.compile; the engine's products are the library's already."""

    def __init__(self, objective: Objective) -> None:
        self.terms = [
            (factor, term if getattr(term, "eager", False) else _compiled(cast(Hashable, term)))
            for factor, term in objective.terms
        ]
        self.representations = objective.representations


@cache
def _compiled(term: Hashable) -> Any:
    twin = copy.copy(term)
    for method in ("add", "add_sampled"):
        if hasattr(term, method):
            object.__setattr__(twin, method, torch.compile(getattr(term, method), dynamic=True))
    return twin


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low_Nr: Tensor | None,
        up: Tensor | None,
        work: _Work,
    ) -> tuple[Tensor, ...]:
        device, wide, look = hidden_NH.device.type, work.wide, work.look
        given = (hidden_NH, weight, bias, low_Nr, up)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in given)
        low = product_dtype(hidden_NH)
        wanted = [work.differentiate and needed for needed in ctx.needs_input_grad[:5]]
        head = work.head.restricted(work.vocabulary, low)
        V = len(head.weight)
        hidden_NH, low_Nr = hidden_NH.to(low), None if low_Nr is None else low_Nr.to(low)
        N = len(hidden_NH)
        # Sums. Of the parameters' full shape: columns beyond the vocabulary keep a zero gradient.
        gradients = [
            torch.zeros_like(tensor, dtype=wide) if want and tensor is not None else None
            for want, tensor in zip(wanted, given, strict=True)
        ]
        grad_hidden_NH, grad_weight, grad_bias, grad_low_Nr, grad_up = gradients
        differentiate = any(wanted)
        sums = [hidden_NH.new_zeros((), dtype=wide) for _ in work.objective.terms]
        kind = _forecast_of or (device if device in _BUDGET else "cuda")
        rows = work.chunk_tokens or _chunk_tokens(work, kind, N, V, narrow=low != wide)
        block_rows = max(1, _BLOCK_BYTES[kind] // (4 * V))
        student_RV: Tensor | None = None

        with torch.autocast(device, enabled=False):
            for chunk in _slices(0, N, rows, None if look is None else look.cuts):
                hidden_nH = hidden_NH[chunk]
                low_nr = None if low_Nr is None else low_Nr[chunk]
                n = len(hidden_nH)
                if student_RV is None or len(student_RV) < n:
                    # Written over by every chunk: fresh memory costs as much as the arithmetic on it.
                    student_RV, gradient_RV = (torch.empty(n, V, dtype=wide, device=hidden_NH.device) for _ in range(2))
                student_nV, gradient_nV = head.write_logits(hidden_nH, student_RV[:n], low_nr), gradient_RV[:n]
                if look is not None:
                    look.open(chunk)
                for tokens in _slices(chunk.start, chunk.stop, block_rows, None if look is None else look.cuts):
                    values = _block(
                        work,
                        tokens,
                        student_nV[tokens.start - chunk.start : tokens.stop - chunk.start],
                        gradient_nV[tokens.start - chunk.start : tokens.stop - chunk.start],
                        head.softcap,
                        differentiate,
                    )
                    for at, values_n in enumerate(values):
                        sums[at] += values_n.sum()
                if not differentiate:
                    continue
                if head.scale != 1.0:
                    gradient_nV *= head.scale
                if grad_bias is not None:
                    grad_bias[:V] += gradient_nV.sum(0)
                narrow_nV = gradient_nV.to(low)
                if grad_hidden_NH is not None:
                    _accumulate(grad_hidden_NH[chunk], narrow_nV, head.weight)
                if grad_weight is not None:
                    _accumulate(grad_weight[:V], narrow_nV.T, hidden_nH)
                if low_nr is not None and head.adapter is not None:
                    if grad_low_Nr is not None:
                        _accumulate(grad_low_Nr[chunk], narrow_nV, head.adapter.up)
                    if grad_up is not None:
                        _accumulate(grad_up[:V], narrow_nV.T, low_nr)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*sums)
        total = torch.zeros((), dtype=wide, device=hidden_NH.device)
        for (factor, _), part in zip(work.objective.terms, sums, strict=True):
            if factor:  # 0 · ∞ is no number
                total = total + factor * part
        return (total, *sums)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        # In place: the head's gradient is the largest tensor left, and a copy would be made when memory is fullest.
        grads = [
            None if g is None else g.mul_(upstream[0]).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None)


def _block(
    work: _Work,
    tokens: slice,
    student_nV: Tensor,
    gradient_nV: Tensor,
    softcap: float | None,
    differentiate: bool,
) -> list[Tensor]:
    """Values of every term, and their gradient by the head's product (before its softcap) in `gradient_nV`."""
    if differentiate:
        gradient_nV.zero_()
    targets_n = work.targets_N[tokens]
    weights_n = None if work.weights_N is None else work.weights_N[tokens]
    values = []
    for factor, term in work.objective.terms:
        block = Block(student_nV, targets_n, factor if differentiate else 0.0, gradient_nV)
        if term.needs_teacher:
            assert work.look is not None
            values_n = work.look.add(term, block, tokens)
        else:
            values_n = term.add(block)
        values.append(values_n if weights_n is None else values_n * weights_n)
    if differentiate:
        if weights_n is not None:
            gradient_nV *= weights_n[:, None]
        if softcap is not None:
            gradient_nV *= 1 - (student_nV / softcap) ** 2
    return values


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right. In low precision each chunk's product is rounded once, the sum is not."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _chunk_tokens(work: _Work, kind: str, N: int, V: int, narrow: bool) -> int:
    """Tokens whose buffers fit the budget."""
    held = 2 * V + (0 if work.look is None else work.look.columns)  # logits and gradients; the teacher's logits
    per_token = held * work.wide.itemsize + (4 * V if narrow else 0)  # products come out in low precision first
    if work.memory_bytes is not None:
        return max(1, work.memory_bytes // per_token)
    return max(_CHUNK_TOKENS, min(_BUDGET[kind] // per_token, N // 16))


def _slices(start: int, stop: int, size: int, cuts: Sequence[bool] | None) -> Iterator[slice]:
    """From `start` to `stop` in slices of at most `size`, or more where no cut is allowed that soon."""
    while start < stop:
        end = min(start + size, stop)
        if cuts is not None:
            while end < stop and end > start + 1 and not cuts[end]:
                end -= 1
            while end < stop and not cuts[end]:  # a span longer than the slice stays whole
                end += 1
        yield slice(start, end)
        start = end
