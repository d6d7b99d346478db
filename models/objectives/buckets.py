"""A divergence over the teacher's likeliest tokens and one bucket for all the others."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.objectives.block import Block
from models.objectives.divergence import Divergence
from models.objectives.softmax import softmax


def add_in_buckets(
    term: Divergence,
    block: Block,
    ids_NK: Int[Tensor, "N K"],
    teacher_NK: Float[Tensor, "N K"],
    teacher_tail_N: Float[Tensor, " N"] | None,
) -> Float[Tensor, " N"]:
    """As `term.add`, on K + 1 categories: the tokens `ids_NK`, and the rest of the vocabulary together.

    Of the block only the teacher's logits are not read: `teacher_NK` stands in their place.

    `teacher_tail_N` is T · log Σ exp(logit / T) over the rest, the logit of the bucket; None where there is no rest
    (K = V). Both distributions are true ones over the same events, so this is a true divergence, at most the one over
    all V categories (data processing), and zero with zero gradient when student equals teacher: unlike a top-k that
    renormalises, or that drops the tail.
    """
    student_NV, gradient_NV = block.student_NV, block.gradient_NV
    kept_NK = student_NV.gather(1, ids_NK)
    if teacher_tail_N is None:
        slope_NK = torch.zeros_like(kept_NK)
        values_N = term.add(Block(kept_NK, block.targets_N, block.weight, slope_NK, teacher_NK))
        gradient_NV.scatter_add_(1, ids_NK, slope_NK)
        return values_N
    # The rest's log-sum-exp over the rest itself: a difference of normalisers would lose a small tail's digits.
    rest_NV, normaliser_N = softmax((student_NV / term.temperature).scatter_(1, ids_NK, float("-inf")))
    rest_NV = rest_NV.masked_fill((normaliser_N == float("-inf"))[:, None], 0.0)  # there is none
    tail_N = (normaliser_N * term.temperature).to(student_NV.dtype)
    buckets_NK = torch.cat([kept_NK, tail_N[:, None]], dim=1)
    slope_NK = torch.zeros_like(buckets_NK)
    taught_NK = torch.cat([teacher_NK, teacher_tail_N[:, None]], dim=1)
    values_N = term.add(Block(buckets_NK, block.targets_N, block.weight, slope_NK, taught_NK))
    if block.weight:
        gradient_NV.scatter_add_(1, ids_NK, slope_NK[:, :-1])
        gradient_NV.addcmul_(rest_NV, slope_NK[:, -1:])
    return values_N


def tail_of(logits_NV: Float[Tensor, "N V"], ids_NK: Int[Tensor, "N K"], temperature: float) -> Float[Tensor, " N"]:
    """T · log Σ exp(logit / T) over the tokens that are not in `ids_NK`."""
    rest_NV = (logits_NV / temperature).scatter_(1, ids_NK, float("-inf"))
    return torch.logsumexp(rest_NV, dim=-1) * temperature
