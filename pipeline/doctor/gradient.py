"""Checks of each term of the objective, and of its gradient, on the hidden states of this training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.heads import head_of, hidden_states, through_head
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.divergence import Divergence
from models.objectives.head import Head
from models.objectives.signal import Dense, TopK
from models.objectives.term import needs_teacher
from pipeline.doctor import truth
from pipeline.doctor.findings import Finding, finding, skipped
from pipeline.doctor.probed import Probed

Result = TypeVar("Result")

_GRADIENT_TOKENS = 64


def _through(model: Any, hidden: Tensor, work: Callable[[Tensor], Result]) -> Result:
    """`work(hidden)` while the head is whole. Its result leaves by the side door: ZeRO-3 takes a head's for tensors."""
    found: list[Result] = []

    def forward(states: Tensor) -> Tensor:
        found.append(work(states))
        return states.detach()

    with torch.no_grad():
        through_head(model, hidden, forward)
    return found[0]


def _hidden(probed: Probed, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return hidden_states(probed.module.student, batch["input_ids"], batch["position_ids"]).detach()


def zero_at_equality(probed: Probed, batch: dict[str, Any]) -> Finding:
    """A student that is its own teacher: each term that asks one is zero, and so is its gradient."""
    module, name = probed.module, "student = teacher"
    asked = [term for _, term in module.objective.terms if term.needs_teacher]
    if not asked:
        return skipped(name, "the objective asks no teacher")
    wrong, told = [], []
    with probed.trainer.precision_plugin.forward_context():
        hidden = _hidden(probed, batch)
        for term in asked:
            for kind in ("whole", "top-k") if isinstance(term, Divergence) and probed.teacher is None else ("whole",):
                value, gradient = _at_equality(probed, term, hidden, batch["targets"], kind)
                which = term.name if kind == "whole" else f"{term.name} of top-k logits"
                told.append(f"{which} {value:.1e} nats, gradient {gradient:.1e}")
                if not (abs(value) <= 1e-5 and gradient <= 1e-5):
                    wrong.append(told[-1])
    remedy = (
        "the term is no divergence as it stands (a cross-entropy, a lost normaliser, a biased top-k): correct it, or "
        "leave it out"
    )
    return finding(name, not wrong, "; ".join(wrong or told), remedy)


def _at_equality(probed: Probed, term: Any, hidden: Tensor, targets: Tensor, kind: str) -> tuple[float, float]:
    """(value per token, gradient's norm as a share of cross-entropy's)."""
    module = probed.module

    def work(states: Tensor, objective: Any) -> tuple[float, float]:
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            head = head_of(module.student)
            head = Head(
                head.weight.detach(), None if head.bias is None else head.bias.detach(), head.scale, head.softcap
            )
            signal: Any = Dense(leaf.detach(), head)
            if kind == "top-k":
                signal = _likeliest(leaf.detach(), head, targets, probed.vocabulary, getattr(term, "temperature", 1.0))
            total, _ = objective_sum(objective, leaf, head, targets, signal, vocabulary=probed.vocabulary)
            (gradient,) = torch.autograd.grad(total, leaf)
        return float(total), float(gradient.float().norm())

    value, gradient = _through(module.student, hidden, lambda states: work(states, _Terms([(1.0, term)])))
    _, usual = _through(module.student, hidden, lambda states: work(states, CrossEntropy()))
    return value / max(1, int((targets >= 0).sum())), gradient / max(usual, 1e-30)


def _likeliest(hidden: Tensor, head: Head, targets: Tensor, vocabulary: int, temperature: float) -> TopK:
    logits_NV = head.logits(hidden.reshape(-1, hidden.shape[-1])[(targets >= 0).reshape(-1)], torch.float32)[
        :, :vocabulary
    ]
    logits_NK, ids_NK = logits_NV.topk(min(8, vocabulary), -1)
    rest_NV = (logits_NV / temperature).scatter(1, ids_NK, -math.inf)
    return TopK(ids_NK, logits_NK, {temperature: torch.logsumexp(rest_NV, -1) * temperature})


def gradient_of_the_loss(probed: Probed, batch: dict[str, Any]) -> Finding:
    """What the objective hands to the model, against autograd through whole logits in float64."""
    name, module = "gradient", probed.module
    targets = batch["targets"].reshape(-1)
    learnt = (targets >= 0).nonzero().squeeze(1)[:_GRADIENT_TOKENS]
    teacher = probed.teacher if needs_teacher(module.objective) else None
    with probed.trainer.precision_plugin.forward_context():
        states = _hidden(probed, batch)
        hidden = states.reshape(-1, states.shape[-1])[learnt]
        taught = None
        if teacher is not None:
            with torch.no_grad():
                states = hidden_states(teacher, batch["input_ids"], batch["position_ids"])
            taught = states.reshape(-1, states.shape[-1])[learnt].detach()
        terms = [(factor, term) for factor, term in module.objective.terms if factor]
        # In bf16 a small divergence's gradient is less than what its logits are rounded by.
        several = {"the objective": terms} if probed.low else {term.name: [(1.0, term)] for _, term in terms}
        found = {of: _apart(probed, hidden, taught, targets[learnt], each) for of, each in several.items()}
    known = {of: each for of, each in found.items() if each is not None}
    if not known:
        return skipped(name, "no term is known here by its definition, with its teacher at hand")
    worst = max(known, key=lambda of: known[of])
    apart = known[worst]
    limit = 5e-2 if probed.low else 1e-3
    remedy = (
        "value and gradient of a term do not belong together (a power of the temperature, a sign, a lost factor): "
        "correct the term"
    )
    told = f"{worst} is {apart:.1e} off, relative, on {len(learnt)} tokens ({limit:g} at most)"
    told += f"; not of {', '.join(sorted(found.keys() - known.keys()))}" if len(known) < len(found) else ""
    return finding(name, apart <= limit, told, remedy)


def _apart(
    probed: Probed, hidden: Tensor, taught: Tensor | None, targets: Tensor, terms: list[tuple[float, Any]]
) -> float | None:
    """Of these terms; None where one is not known, or asks a teacher that is not at hand."""
    module, V = probed.module, probed.vocabulary

    def with_head(states: Tensor, teachers: Head | None) -> float | None:
        head = head_of(module.student)
        if head.adapter is not None:
            return None
        signal = None if teachers is None or taught is None else Dense(taught, teachers)
        if signal is None and any(term.needs_teacher for _, term in terms):
            return None
        leaf, exact = states.detach().requires_grad_(), states.detach().double().requires_grad_()
        with torch.enable_grad():
            total, _ = objective_sum(_Terms(terms), leaf, head, targets, signal, vocabulary=V)
            (found,) = torch.autograd.grad(total, leaf)
            student_nV = _dense(exact, head)[:, :V]
            teacher_nV = (
                None
                if signal is None or taught is None or teachers is None
                else _dense(taught.double(), teachers)[:, :V]
            )
            true_loss = exact.new_zeros(())
            for factor, term in terms:
                if (value_n := truth.value(term, student_nV, teacher_nV, targets)) is None:
                    return None
                true_loss = true_loss + factor * value_n.sum()
            (true,) = torch.autograd.grad(true_loss, exact)
        return float((found.double() - true).norm() / true.norm().clamp_min(1e-5))

    if probed.teacher is None or taught is None:
        return _through(module.student, hidden, lambda states: with_head(states, None))

    def with_teacher(_: Tensor) -> float | None:
        return _through(module.student, hidden, lambda states: with_head(states, head_of(probed.teacher)))

    return _through(probed.teacher, taught, with_teacher)


def _dense(states: Tensor, head: Head) -> Tensor:
    logits = states @ head.weight.detach().double().T
    logits = (logits if head.bias is None else logits + head.bias.detach().double()) * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


@dataclass(frozen=True)
class _Terms:
    """An objective without what compares layers."""

    terms: list[tuple[float, Any]]

    @property
    def representations(self) -> list[Any]:
        return []
