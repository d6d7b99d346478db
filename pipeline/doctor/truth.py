"""The loss by its definition: whole logits in float64, a document at a time, with no padding and no packing.

What training reports goes through chunks, packed sequences, micro-batches and ranks; nothing of that is used here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

_TOKENS = 256  # whose logits are in float64 at once


def _expected(p_nV: Tensor, value_nV: Tensor) -> Tensor:
    """Σ p · value, where 0 · ∞ is 0."""
    return torch.where(p_nV > 0, p_nV * value_nV, 0.0).sum(-1)


def _kl(p_nV: Tensor, q_nV: Tensor) -> Tensor:
    """Of log-probabilities."""
    return _expected(p_nV.exp(), p_nV - q_nV)


def _mixed(share: float, p_nV: Tensor, q_nV: Tensor) -> Tensor:
    return torch.logaddexp(p_nV + math.log(share), q_nV + math.log1p(-share))


def _jensen_shannon(term: Any, p_nV: Tensor, q_nV: Tensor) -> Tensor:
    if term.beta in (0, 1):
        return _kl(q_nV, p_nV) if term.beta else _kl(p_nV, q_nV)
    middle_nV = _mixed(term.beta, p_nV, q_nV)
    return term.beta * _kl(p_nV, middle_nV) + (1 - term.beta) * _kl(q_nV, middle_nV)


# By a term's name: of the term and both log-probabilities at its temperature T, without the power of T; and that power.
_DIVERGENCES: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], int]] = {
    "forward_kl": (lambda term, p, q: _kl(p, q), 2),
    "reverse_kl": (lambda term, p, q: _kl(q, p), 2),
    "jensen_shannon": (_jensen_shannon, 2),
    "skew_forward_kl": (lambda term, p, q: _kl(p, _mixed(term.skew, p, q)), 2),
    "skew_reverse_kl": (lambda term, p, q: _kl(q, _mixed(1 - term.skew, p, q)), 2),
    "total_variation": (lambda term, p, q: (p.exp() - q.exp()).abs().sum(-1) / 2, 1),
}


def value(term: Any, student_nV: Tensor, teacher_nV: Tensor | None, targets_n: Tensor) -> Tensor | None:
    """Of a term per token, from logits; None where its definition is not known here, or needs a teacher's."""
    if term.name == "cross_entropy":
        return -torch.log_softmax(student_nV, -1).gather(1, targets_n[:, None]).squeeze(1)
    if term.name not in _DIVERGENCES or teacher_nV is None:
        return None
    of, power = _DIVERGENCES[term.name]
    p_nV, q_nV = (torch.log_softmax(z / term.temperature, -1) for z in (teacher_nV, student_nV))
    return of(term, p_nV, q_nV) * term.temperature**power


@dataclass
class Document:
    """A text by itself: its tokens, each one's target or -100, and what each target counts."""

    ids: list[int]
    targets: list[int]
    weights: list[float]


def documents(row: dict[str, Any]) -> Iterator[Document]:
    """Of a packed sequence, those with anything to learn."""
    begins = [at for at, position in enumerate(row["position_ids"]) if position == 0]
    weights = row.get("weights") or [1.0] * len(row["input_ids"])
    for a, b in zip(begins, [*begins[1:], len(row["input_ids"])], strict=True):
        if any(target >= 0 for target in row["targets"][a:b]):
            yield Document(row["input_ids"][a:b], row["targets"][a:b], weights[a:b])


@dataclass
class Sums:
    """Over the documents of a rank, then of all: by a term's name, and what they are divided by."""

    terms: dict[str, float] = field(default_factory=dict)
    tokens: float = 0.0
    unknown: set[str] = field(default_factory=set)


@torch.no_grad()
def sums(
    terms: Sequence[Any], student: Any, teacher: Any, rows: Sequence[dict[str, Any]], vocabulary: int, forwards: int
) -> Sums:
    """`forwards`: so many are run, as on every rank: under ZeRO-3 they are collective. `vocabulary`: of the tokenizer.
    `teacher`: a model, or None."""
    result = Sums()
    device = next(student.parameters()).device
    mine = [document for row in rows for document in documents(row)]
    blank = Document([0], [0], [0.0])
    for document in [*mine, *[blank] * (forwards - len(mine))]:
        logits = [None if model is None else _logits(model, document.ids, device) for model in (student, teacher)]
        learnt = [at for at, target in enumerate(document.targets) if target >= 0]
        for begin in range(0, len(learnt), _TOKENS):
            at = learnt[begin : begin + _TOKENS]
            targets_n = torch.tensor([document.targets[i] for i in at], device=device)
            weights_n = torch.tensor([document.weights[i] for i in at], device=device, dtype=torch.float64)
            student_nV, teacher_nV = (None if z is None else z[at, :vocabulary].double() for z in logits)
            assert student_nV is not None
            for term in terms:
                found_n = value(term, student_nV, teacher_nV, targets_n)
                if found_n is None:
                    result.unknown.add(term.name)
                else:
                    result.terms[term.name] = result.terms.get(term.name, 0.0) + float((found_n * weights_n).sum())
            result.tokens += float(weights_n.sum())
    return result


def _logits(model: Any, ids: list[int], device: torch.device) -> Tensor:
    """By the model's own forward, on a row of its own."""
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]
