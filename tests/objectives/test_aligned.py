"""Teachers with another tokenizer: the signal against sums over categories, written out span by span."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from models.objectives.adaptive_kl import AdaptiveKL
from models.objectives.aligned import Aligned
from models.objectives.alpha_beta import AlphaBeta
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Dense
from models.objectives.skew_forward_kl import SkewForwardKL
from models.objectives.skew_reverse_kl import SkewReverseKL
from models.objectives.top_k import TopK
from models.objectives.total_variation import TotalVariation
from models.objectives.universal_logit import UniversalLogit
from tests.objectives.test_objectives import VOCABULARY, Case, assert_close

TEACHER_VOCABULARY, TEACHER_LENGTH = 19, 9
MORE, TAUGHT_MORE = 16, 17  # tokens without a partner, with which spans go on


class Spanned(Case):
    """Rows of 7 student tokens and 9 teacher tokens; spans of one to three tokens on either side."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(dtype)
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.randint(VOCABULARY, self.targets.shape, generator=generator)
        self.targets[:, -1] = -100
        self.targets[1, 0] = -100
        self.taught = torch.randn(3, TEACHER_LENGTH, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.taught_weight = torch.randn(TEACHER_VOCABULARY, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.taught_targets = torch.randint(TEACHER_VOCABULARY, (3, TEACHER_LENGTH), generator=generator)
        # (row, student position, tokens, teacher position, tokens)
        self.spans = torch.tensor(
            [
                (0, 0, 1, 0, 1),
                (0, 1, 2, 1, 1),  # the teacher writes it as one token
                (0, 3, 1, 2, 3),  # the student does
                (0, 4, 2, 5, 2),
                (1, 1, 3, 0, 2),
                (1, 5, 1, 4, 1),
                (2, 2, 2, 3, 1),
                (2, 4, 1, 4, 2),
            ]
        )
        self.taught_bias = torch.zeros(TEACHER_VOCABULARY, dtype=dtype)
        # Paired: the student's 0 … 9 with the teacher's 5 … 14; and make some of the written tokens paired ones.
        self.student_ids, self.teacher_ids = torch.arange(0, 10), torch.arange(5, 15)
        self.targets[0, 1], self.taught_targets[0, 1] = 3, 12  # first of several, paired; alone, paired
        self.targets[0, 3], self.taught_targets[0, 2] = 7, 9  # alone, paired; first of several, paired
        self.targets[2, 2], self.taught_targets[2, 3] = 20, 1  # neither has a partner
        self.targets[2, 4], self.taught_targets[2, 4] = 22, 6

    @property
    def aligned(self) -> Aligned:
        return Aligned(
            self.taught,
            Head(self.taught_weight, self.taught_bias),
            self.taught_targets,
            self.spans,
            self.targets.shape[1],
            self.student_ids,
            self.teacher_ids,
        )

    def run_aligned(self, objective: Any, **words: Any) -> list[Tensor]:
        total, _ = objective_sum(objective, self.hidden, self.head, self.targets, self.aligned, **words)
        return [total, *torch.autograd.grad(total, self.inputs)]

    def categories(self, span: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Probabilities of the events at a span, one by one: (student's, teacher's), each normalised."""
        row, at, count, taught_at, taught_count = span.tolist()
        student = torch.log_softmax((self.hidden[row] @ self.weight.T + self.bias) / temperature, -1).exp()
        taught = self.taught[row] @ self.taught_weight.T + self.taught_bias
        teacher = torch.log_softmax(taught / temperature, -1).exp()
        written = self.targets[row, at : at + count].tolist()
        taught_written = self.taught_targets[row, taught_at : taught_at + taught_count].tolist()

        def events(p: Tensor, at: int, written: list[int], ids: list[int]) -> dict[Any, Tensor]:
            found: dict[Any, Tensor] = {pair: p[at, token] for pair, token in enumerate(ids)}
            chance = p[at, written[0]]
            for step, token in enumerate(written[1:], 1):
                chance = chance * p[at + step, token]
            if written[0] in ids and len(written) > 1:
                pair = ids.index(written[0])
                found[pair] = found[pair] - chance
            found["span"] = chance
            return found

        ours = events(student, at, written, self.student_ids.tolist())
        theirs = events(teacher, taught_at, taught_written, self.teacher_ids.tolist())
        for tokens, ids, one, other in (
            (written, self.student_ids.tolist(), ours, theirs),
            (taught_written, self.teacher_ids.tolist(), theirs, ours),
        ):
            if len(tokens) == 1 and tokens[0] in ids:  # the same bytes, written alone: one event, not two
                pair = ids.index(tokens[0])
                other["span"] = other["span"] + other.pop(pair)
                one.pop(pair)
        if count == taught_count == 1:  # a plain token: its own category, or none
            ours = {pair: student[at, token] for pair, token in enumerate(self.student_ids.tolist())}
            theirs = {pair: teacher[taught_at, token] for pair, token in enumerate(self.teacher_ids.tolist())}
        assert ours.keys() == theirs.keys()
        q, p = (torch.stack([events[name] for name in ours]) for events in (ours, theirs))
        return q / q.sum(), p / p.sum()


def by_events(case: Spanned, term: Any, formula: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    total = torch.zeros((), dtype=torch.float64)
    for span in case.spans:
        q, p = case.categories(span, term.temperature)
        total = total + formula(p, q) * term.temperature ** getattr(term, "order", 2)
    return [total, *torch.autograd.grad(total, case.inputs)]


def test_tokens_outside_spans_get_no_soft_gradient_and_all_the_hard_one() -> None:
    case = Spanned()
    _, soft, *_ = case.run_aligned(ForwardKL(1.0))
    outside = [(0, 6), (1, 0), (1, 4 + 2), (2, 0), (2, 1), (2, 5)]
    assert all((soft[at] == 0).all() for at in outside)
    hard = objective_sum(CrossEntropy(), case.hidden, case.head, case.targets)[0]
    both = case.run_aligned(Distillation(0.25, ForwardKL(1.0)))[0]
    torch.testing.assert_close(both, 0.25 * hard + 0.75 * case.run_aligned(ForwardKL(1.0))[0])


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Of the events that p has: 0 · log 0 is 0, with gradient 0."""
    has = p > 0
    return (p[has] * (p[has] / q[has]).log()).sum()


def mixed(first: float, second: float, share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """first · KL(p ‖ m) + second · KL(q ‖ m), m = share · p + (1 − share) · q."""
    return lambda p, q: sum(
        (weight * kl(each, share * p + (1 - share) * q) for weight, each in ((first, p), (second, q)) if weight),
        start=torch.zeros((), dtype=p.dtype),
    )


def alpha_beta(p: Tensor, q: Tensor, a: float = 0.2, b: float = 0.7) -> Tensor:
    has, both = q > 0, (q > 0) & (p > 0)
    inner = (p[both] ** a * q[both] ** b).sum() - b / (a + b) * (q[has] ** (a + b)).sum()
    return -(inner - a / (a + b) * (p ** (a + b)).sum()) / (a * b)


def adaptive(p: Tensor, q: Tensor) -> Tensor:
    order = p.argsort(descending=True)
    head = order[: max(1, int((p[order].cumsum(0) <= 0.5).sum()))]
    gap = (p - q.detach()).abs()
    share = gap[head].sum() / gap.sum()
    return share * kl(p, q) + (1 - share) * kl(q, p)


def three_and_the_rest(p: Tensor, q: Tensor) -> Tensor:
    kept = p.topk(3).indices
    rest = torch.ones_like(p, dtype=torch.bool).index_fill(0, kept, False)
    return kl(*(torch.cat([each[kept], each[rest].sum()[None]]) for each in (p, q)))


# Of the teacher's p and the student's q.
DENSE: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "forward": (ForwardKL, kl),
    "reverse": (ReverseKL, lambda p, q: kl(q, p)),
    "jensen_shannon": (partial(JensenShannon, beta=0.3), mixed(0.3, 0.7, 0.3)),
    "skew_forward": (SkewForwardKL, mixed(1.0, 0.0, 0.1)),
    "skew_reverse": (SkewReverseKL, mixed(0.0, 1.0, 0.9)),
    "total_variation": (TotalVariation, lambda p, q: (p - q).abs().sum() / 2),
    "alpha_beta": (AlphaBeta, alpha_beta),
    "adaptive": (AdaptiveKL, adaptive),
    "top_k": (lambda temperature: TopK(3, ForwardKL(temperature)), three_and_the_rest),
}
# Tokens that cannot be said, the student's and the teacher's, in Spanned.
IMPOSSIBLE: dict[str, tuple[list[int], list[int]]] = {
    "nothing": ([], []),
    "a category of the student's": ([0], []),
    "a category of the teacher's": ([], [5]),
    "a category of both": ([0], [5]),
    "the student's way on in a span": ([MORE], []),
    "the teacher's way on in a span": ([], [TAUGHT_MORE]),
    "all that the student has for a span": ([MORE, 7], []),
    "all that the teacher has for a span": ([], [TAUGHT_MORE, 12]),
    "what both have for a span": ([MORE, 7], [12, TAUGHT_MORE]),
    "a span without a partner": ([20], []),
    "a span without a partner, of both": ([20], [1]),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_tokens", [1, 4, None])
def test_it_equals_the_sum_over_events(name: str, temperature: float, chunk_tokens: int | None) -> None:
    make, formula = DENSE[name]
    case = Spanned()
    got = case.run_aligned(make(temperature), chunk_tokens=chunk_tokens)
    assert_close(got, by_events(case, make(temperature), formula), 1e-9)


def test_in_fp32_it_follows_fp64() -> None:
    truth = by_events(Spanned(), ForwardKL(1.0), kl)
    assert_close(Spanned(torch.float32).run_aligned(ForwardKL(1.0)), truth, 1e-5)


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
@pytest.mark.parametrize("name", DENSE)
def test_what_cannot_be_said_has_probability_zero_and_a_gradient_that_is_a_number(name: str, impossible: str) -> None:
    """Truth: the dense formula, in which 0 · log 0 is 0; where that is infinite, so is the loss, and training stops."""
    make, formula = DENSE[name]
    case = Spanned()
    ours, theirs = IMPOSSIBLE[impossible]
    case.targets[0, 2], case.taught_targets[0, 3] = MORE, TAUGHT_MORE
    assert case.bias is not None
    case.bias.data[ours] = -math.inf
    case.taught_bias[theirs] = -math.inf
    expected = by_events(case, make(2.0), formula)
    for chunk_tokens in (1, 4, None):
        got = case.run_aligned(make(2.0), chunk_tokens=chunk_tokens)
        if expected[0].isfinite():
            assert_close(got, expected, 1e-9)
        else:
            assert got[0] == math.inf


@pytest.mark.parametrize("impossible", IMPOSSIBLE)
def test_by_rank_what_cannot_be_said_is_the_last(impossible: str) -> None:
    case = Spanned()
    ours, theirs = IMPOSSIBLE[impossible]
    assert case.bias is not None
    case.bias.data[ours] = -math.inf
    case.taught_bias[theirs] = -math.inf
    expected = ranked(case)
    for chunk_tokens in (1, 5, None):
        assert_close(case.run_aligned(UniversalLogit(1.0), chunk_tokens=chunk_tokens), expected, 1e-12)


def one_to_one(case: Case) -> Aligned:
    """The same tokenizer on both sides: every supervised token a span."""
    rows, positions = (case.targets != -100).nonzero(as_tuple=True)
    ones = torch.ones_like(rows)
    every = torch.arange(VOCABULARY)
    spans = torch.stack([rows, positions, ones, positions, ones], 1)
    return Aligned(case.teacher_hidden, case.teacher_head, case.targets, spans, case.targets.shape[1], every, every)


@pytest.mark.parametrize(
    "divergence", [ForwardKL(2.0), ReverseKL(1.0), JensenShannon(1.0), TotalVariation(1.0), UniversalLogit(1.0)]
)
def test_with_identical_tokenizers_it_is_the_same_vocabulary_loss_to_the_bit(divergence: Any) -> None:
    case = Case()
    total, parts, gradients = case.run(divergence, chunk_tokens=4)
    again, other_parts = objective_sum(
        divergence, case.hidden, case.head, case.targets, one_to_one(case), chunk_tokens=4
    )
    assert again == total
    assert parts == other_parts
    for mine, theirs in zip(torch.autograd.grad(again, case.inputs), gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_of_a_model_with_itself_it_is_zero_though_spans_take_several_tokens() -> None:
    case = Case(bias=False)
    case.targets.clamp_min_(0)
    every = torch.arange(VOCABULARY)
    spans = torch.tensor([(0, 0, 2, 0, 2), (0, 2, 3, 2, 3), (1, 1, 1, 1, 1), (2, 0, 4, 0, 4)])
    itself = Aligned(
        case.hidden.detach(), Head(case.weight.detach()), case.targets, spans, case.targets.shape[1], every, every
    )
    total, _ = objective_sum(ForwardKL(2.0), case.hidden, case.head, case.targets, itself)
    assert abs(total.item()) < 1e-12
    assert all(gradient.abs().max() < 1e-12 for gradient in torch.autograd.grad(total, case.inputs))


def ranked(case: Spanned) -> list[Tensor]:
    """Where spans begin, the two models' own columns by their rank."""
    expected = torch.zeros((), dtype=torch.float64)
    for row, at, _, taught_at, _ in case.spans.tolist():
        q = torch.softmax(case.hidden[row, at] @ case.weight.T + case.bias, -1).sort(descending=True).values
        p = torch.softmax(case.taught[row, taught_at] @ case.taught_weight.T + case.taught_bias, -1)
        p = torch.cat([p.sort(descending=True).values, p.new_zeros(VOCABULARY - TEACHER_VOCABULARY)])
        expected = expected + (p - q).abs().sum()
    return [expected, *torch.autograd.grad(expected, case.inputs)]


def test_universal_logits_compare_the_two_models_own_columns_where_spans_begin() -> None:
    case = Spanned()
    assert_close(case.run_aligned(UniversalLogit(1.0), chunk_tokens=5), ranked(case), 1e-12)


def test_a_span_over_tokens_that_are_not_supervised_is_refused() -> None:
    case = Spanned()
    case.targets[0, 2] = -100
    with pytest.raises(ValueError, match="not supervised"):
        case.run_aligned(ForwardKL(1.0))


def test_tokens_of_a_span_with_different_weights_are_refused_and_with_one_weight_they_count_so() -> None:
    case = Spanned()
    weights = torch.ones_like(case.targets, dtype=torch.float64)
    weights[0] = 0.5
    row, rest = case.spans[:4], case.spans[4:]
    case.spans = row
    half = case.run_aligned(ForwardKL(1.0))[0] / 2
    case.spans = rest
    expected = half + case.run_aligned(ForwardKL(1.0))[0]
    case.spans = torch.cat([row, rest])
    assert_close([case.run_aligned(ForwardKL(1.0), weights=weights)[0]], [expected], 1e-12)
    weights[0, 2] = 0.25
    with pytest.raises(ValueError, match="different weights"):
        case.run_aligned(ForwardKL(1.0), weights=weights)


def test_a_batch_without_spans_gives_zero() -> None:
    case = Spanned()
    case.spans = case.spans[:0]
    total, *gradients = case.run_aligned(ForwardKL(1.0))
    assert total == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_the_teachers_padded_columns_change_nothing() -> None:
    case = Spanned()
    expected = case.run_aligned(ForwardKL(1.0))
    padded = torch.cat([case.taught_weight, torch.full((5, 6), 9.0, dtype=torch.float64)])
    signal = case.aligned
    signal = Aligned(**{**vars(signal), "head": Head(padded), "teacher_vocabulary": TEACHER_VOCABULARY})
    total, _ = objective_sum(ForwardKL(1.0), case.hidden, case.head, case.targets, signal)
    assert_close([total, *torch.autograd.grad(total, case.inputs)], expected, 1e-12)


def test_dense_and_aligned_teachers_get_no_gradient() -> None:
    case = Spanned()
    case.taught.requires_grad_()
    case.taught_weight.requires_grad_()
    objective_sum(ForwardKL(), case.hidden, case.head, case.targets, case.aligned)[0].backward()
    assert case.taught.grad is None
    assert case.taught_weight.grad is None
    assert isinstance(case.signal, Dense)
