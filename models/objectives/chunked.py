"""From hidden states and heads to loss and gradients, a chunk of tokens at a time.

The logits of a large vocabulary are the largest tensor of a training step: 8192 tokens × 128k × 4 bytes are 4 GiB, and
student, teacher, softmax and gradient want one each. Here no [tokens × vocabulary] tensor exists: each chunk's logits
are made, turned into values and gradients by the objective's terms in one pass, and dropped. Sums are kept in fp32
(fp64 for fp64 inputs) whatever the model's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.term import Objective

# Logits of one chunk: the matrix products, which sweep the whole head for every chunk, want it large.
_CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}
_CHUNK_TOKENS = 128  # and at least these, however large the vocabulary
# Logits of one block, on which the terms work: small enough for a CPU's caches, large enough to fill a GPU.
_BLOCK_BYTES = {"cpu": 2 * 2**20, "cuda": 32 * 2**20}
IGNORED = -100


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale · (hidden @ weight.T + bias)), softcap(z) = cap · tanh(z / cap)."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden_NH: Float[Tensor, "N H"], dtype: torch.dtype) -> Float[Tensor, "N V"]:
        return self.write_logits(hidden_NH, hidden_NH.new_empty(len(hidden_NH), len(self.weight), dtype=dtype))

    def write_logits(self, hidden_NH: Float[Tensor, "N H"], logits_NV: Float[Tensor, "N V"]) -> Float[Tensor, "N V"]:
        """Into `logits_NV`, in its dtype; outside autograd."""
        if hidden_NH.dtype == logits_NV.dtype:
            torch.mm(hidden_NH, self.weight.T, out=logits_NV)
            if self.bias is not None:
                logits_NV += self.bias
        else:
            logits_NV.copy_(torch.nn.functional.linear(hidden_NH, self.weight, self.bias))
        if self.scale != 1.0:
            logits_NV *= self.scale
        if self.softcap is not None:
            logits_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits_NV

    def restricted(self, vocabulary: int | None, dtype: torch.dtype) -> Head:
        """The first `vocabulary` columns (a padded table has more rows than its tokenizer has tokens), in `dtype`."""
        weight = self.weight.detach()[:vocabulary].to(dtype)
        bias = None if self.bias is None else self.bias.detach()[:vocabulary].to(dtype)
        return Head(weight, bias, self.scale, self.softcap)


def objective_sum(
    objective: Objective,
    hidden: Float[Tensor, "*tokens H"],
    head: Head,
    targets: Int[Tensor, "*tokens"],
    teacher_hidden: Float[Tensor, "*tokens Ht"] | None = None,
    teacher_head: Head | None = None,
    *,
    vocabulary: int | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Sum of the objective over tokens whose target is not -100, and the detached sum of each of its terms.

    `vocabulary`: number of columns that stand for tokens; those beyond are as if they were not there, in both models.
    The sum is differentiable by `hidden`, `head.weight` and `head.bias`, once: the gradients are ready by then, and a
    second backward would find them used up. The teacher gets no gradient.
    """
    supervised = (targets != IGNORED).reshape(-1).nonzero().squeeze(1)
    flat_NH = hidden.reshape(-1, hidden.shape[-1]).index_select(0, supervised)
    teacher_NH = None
    if any(term.needs_teacher for _, term in objective.terms):
        if teacher_hidden is None or teacher_head is None:
            raise ValueError("the objective has a term that needs a teacher, and none was given")
        teacher_NH = teacher_hidden.detach().reshape(-1, teacher_hidden.shape[-1]).index_select(0, supervised)
    weight, bias = head.weight, head.bias
    work = _Work(
        objective,
        head,
        teacher_NH,
        teacher_head,
        targets.reshape(-1)[supervised],
        vocabulary,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    total, *parts = _Chunked.apply(flat_NH, weight, bias, work)
    return total, dict(zip((term.name for _, term in objective.terms), parts, strict=True))


@dataclass
class _Work:
    """Everything of a call that autograd need not see."""

    objective: Objective
    head: Head
    teacher_NH: Tensor | None
    teacher_head: Head | None
    targets_N: Tensor
    vocabulary: int | None
    chunk_tokens: int | None
    differentiate: bool  # inside the function autograd is off, and needs_input_grad does not know of no_grad


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> tuple[Tensor, ...]:
        device = hidden_NH.device.type
        ctx.dtypes = (hidden_NH.dtype, weight.dtype, None if bias is None else bias.dtype)
        # Under autocast the products run in its dtype, as the model's own head would.
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_NH.dtype
        wide = torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
        wants_hidden, wants_weight, wants_bias = (work.differentiate and needed for needed in ctx.needs_input_grad[:3])
        head = work.head.restricted(work.vocabulary, low)
        V = len(head.weight)
        hidden_NH = hidden_NH.to(low)
        teacher_head = None
        if work.teacher_NH is not None and work.teacher_head is not None:
            teacher_head = work.teacher_head.restricted(work.vocabulary, work.teacher_NH.dtype)
            if len(teacher_head.weight) != V:
                raise ValueError(
                    f"student head has {V} columns and teacher head {len(teacher_head.weight)}: "
                    f"pass vocabulary, the number of tokens that both tokenizers share"
                )
        N = len(hidden_NH)
        kind = device if device in _CHUNK_BYTES else "cuda"
        rows = work.chunk_tokens or max(_CHUNK_TOKENS, _CHUNK_BYTES[kind] // (4 * V))
        rows = max(1, min(rows, N))
        block_rows = max(1, _BLOCK_BYTES[kind] // (4 * V))
        # Written over by every chunk: fresh memory costs as much as the arithmetic on it.
        student_RV, gradient_RV = (torch.empty(rows, V, dtype=wide, device=hidden_NH.device) for _ in range(2))
        teacher_RV = torch.empty_like(student_RV) if teacher_head is not None else None
        grad_hidden_NH = torch.zeros_like(hidden_NH, dtype=wide) if wants_hidden else None
        # Of the parameter's full shape: columns beyond the vocabulary keep a zero gradient.
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias and bias is not None else None
        wants_any = wants_hidden or wants_weight or wants_bias
        sums = [hidden_NH.new_zeros((), dtype=wide) for _ in work.objective.terms]

        with torch.autocast(device, enabled=False):
            for begin in range(0, N, rows):
                chunk = slice(begin, begin + rows)
                hidden_nH, targets_n = hidden_NH[chunk], work.targets_N[chunk]
                n = len(hidden_nH)
                student_nV, gradient_nV = head.write_logits(hidden_nH, student_RV[:n]), gradient_RV[:n]
                teacher_nV = None
                if teacher_head is not None and work.teacher_NH is not None and teacher_RV is not None:
                    teacher_nV = teacher_head.write_logits(work.teacher_NH[chunk], teacher_RV[:n])
                for start in range(0, n, block_rows):
                    block = slice(start, start + block_rows)
                    if wants_any:
                        gradient_nV[block].zero_()
                    taught_nV = None if teacher_nV is None else teacher_nV[block]
                    for at, (factor, term) in enumerate(work.objective.terms):
                        values_n = term.add(
                            student_nV[block],
                            taught_nV if term.needs_teacher else None,
                            targets_n[block],
                            factor if wants_any else 0.0,
                            gradient_nV[block],
                        )
                        sums[at] += values_n.sum()
                    if head.softcap is not None and wants_any:
                        gradient_nV[block] *= 1 - (student_nV[block] / head.softcap) ** 2
                if not wants_any:
                    continue
                if head.scale != 1.0:
                    gradient_nV *= head.scale
                if grad_bias is not None:
                    grad_bias[:V] += gradient_nV.sum(0)
                gradient_nV = gradient_nV.to(low)
                if grad_hidden_NH is not None:
                    grad_hidden_NH[chunk] = gradient_nV @ head.weight
                if grad_weight is not None:
                    if low == wide:
                        grad_weight[:V].addmm_(gradient_nV.T, hidden_nH)
                    else:
                        grad_weight[:V] += gradient_nV.T @ hidden_nH
        ctx.save_for_backward(grad_hidden_NH, grad_weight, grad_bias)
        ctx.mark_non_differentiable(*sums)
        total = torch.zeros((), dtype=wide, device=hidden_NH.device)
        for (factor, _), part in zip(work.objective.terms, sums, strict=True):
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
