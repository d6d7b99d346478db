"""What is measured beside an objective, against dense formulas; and that it changes nothing of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models.objectives.chunked import objective_sum
from models.objectives.contexts import Contexts
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.nearness import with_nearness
from models.objectives.signal import Dense, Sampled, TopK

N, V, H = 37, 29, 8
OBJECTIVE = Distillation(0.3, ForwardKL(2.0))


def parts() -> tuple[Tensor, Head, Dense, Tensor]:
    torch.manual_seed(0)
    student, weight = torch.randn(N, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    signal = Dense(student + torch.randn(N, H), Head(weight + 0.3 * torch.randn(V, H)))  # alike, and not the same
    targets = torch.randint(0, V, (N,))
    targets[::5] = -100
    return student.requires_grad_(), Head(weight.requires_grad_()), signal, targets


@pytest.mark.parametrize("chunk_tokens", [1, 7, 100])
def test_gap_and_agreement_are_those_of_the_whole_logits(chunk_tokens: int) -> None:
    hidden, head, signal, targets = parts()
    _, found = objective_sum(with_nearness(OBJECTIVE, signal), hidden, head, targets, signal, chunk_tokens=chunk_tokens)
    student_NV, teacher_NV = hidden @ head.weight.T, signal.hidden @ signal.head.weight.T
    losses = [torch.nn.functional.cross_entropy(z, targets, reduction="sum").item() for z in (student_NV, teacher_NV)]
    same = (student_NV.argmax(-1) == teacher_NV.argmax(-1))[targets >= 0]
    assert found["teacher_gap"].item() == pytest.approx(losses[0] - losses[1], rel=1e-12)
    assert found["top1_agreement"].item() == same.sum().item()
    assert 0 < same.sum() < len(same)


def test_loss_and_gradients_are_the_same_to_the_bit_with_what_is_measured_beside() -> None:
    results = []
    for beside in (False, True):
        hidden, head, signal, targets = parts()
        objective = with_nearness(OBJECTIVE, signal) if beside else OBJECTIVE
        total, found = objective_sum(objective, hidden, head, targets, signal, chunk_tokens=5)
        total.backward()
        results.append([total, hidden.grad, head.weight.grad, found["forward_kl"]])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_of_a_teacher_that_excludes_the_target_the_gap_is_infinite_and_the_loss_is_not() -> None:
    hidden, head, signal, targets = parts()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[targets[1]] = -math.inf
    signal = Dense(signal.hidden, Head(signal.head.weight, bias))
    total, found = objective_sum(with_nearness(OBJECTIVE, signal), hidden, head, targets, signal)
    assert found["teacher_gap"].item() == -math.inf
    assert total.isfinite()


def test_of_several_prompts_the_gap_is_to_the_mean_of_their_distributions() -> None:
    hidden, head, signal, targets = parts()
    learnt = targets >= 0
    states_DNH = torch.stack([signal.hidden[learnt], signal.hidden[learnt].flip(0)])
    contexts = Contexts(states_DNH, signal.head)
    _, found = objective_sum(with_nearness(OBJECTIVE, contexts), hidden, head, targets, contexts)
    student_NV = (hidden @ head.weight.T).detach()[learnt]
    mean_NV = torch.softmax(states_DNH @ signal.head.weight.T, -1).mean(0)
    cross_entropy = torch.nn.functional.cross_entropy(student_NV, targets[learnt], reduction="sum")
    teachers = -mean_NV.log().gather(1, targets[learnt][:, None]).sum()
    assert found["teacher_gap"].item() == pytest.approx((cross_entropy - teachers).item(), rel=1e-12)
    assert found["top1_agreement"].item() == (student_NV.argmax(-1) == mean_NV.argmax(-1)).sum().item()


def test_of_a_teachers_likeliest_tokens_agreement_is_known_and_the_gap_is_not() -> None:
    hidden, head, signal, targets = parts()
    teacher_NV = (signal.hidden @ signal.head.weight.T)[targets >= 0]
    logits_NK, ids_NK = teacher_NV.topk(4, dim=-1)
    order = torch.tensor([2, 0, 3, 1])  # in whatever order they come
    rest = teacher_NV.scatter(1, ids_NK, -math.inf)
    tails = {2.0: 2 * torch.logsumexp(rest / 2, -1)}
    top = TopK(ids_NK[:, order], logits_NK[:, order], tails)
    _, found = objective_sum(with_nearness(OBJECTIVE, top), hidden, head, targets, top)
    student_NV = (hidden @ head.weight.T)[targets >= 0]
    assert found["top1_agreement"].item() == (student_NV.argmax(-1) == teacher_NV.argmax(-1)).sum().item()
    assert "teacher_gap" not in found


def test_of_draws_nothing_is_said() -> None:
    sampled = Sampled(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), torch.zeros(1), 1.0)
    assert with_nearness(OBJECTIVE, sampled) is OBJECTIVE
    assert with_nearness(OBJECTIVE, None) is OBJECTIVE
