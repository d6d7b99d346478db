"""Every divergence against its formula in the paper, written out densely in fp64 with autograd's gradient; and every
one of conf/divergence against what is promised of all (models/objectives/divergence.py), be its formula here or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.objectives.adaptive_kl import AdaptiveKL
from models.objectives.alpha_beta import AlphaBeta
from models.objectives.block import Block
from models.objectives.divergence import log_mix
from models.objectives.forward_kl import ForwardKL
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.reverse_kl import ReverseKL
from models.objectives.skew_forward_kl import SkewForwardKL
from models.objectives.skew_reverse_kl import SkewReverseKL
from models.objectives.top_k import TopK
from models.objectives.total_variation import TotalVariation
from models.objectives.universal_logit import UniversalLogit
from tests.objectives.test_objectives import VOCABULARY, Case, assert_close

Formula = Callable[[Tensor, Tensor, float], Tensor]  # student's and teacher's logits, T → value per token


def kl(p: Tensor, q: Tensor) -> Tensor:
    """PyTorch's own, summed over the vocabulary."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def both(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return F.softmax(teacher / temperature, -1), F.softmax(student / temperature, -1)


def forward(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    return temperature**2 * kl(*both(student, teacher, temperature))


def reverse(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = both(student, teacher, temperature)
    return temperature**2 * kl(q, p)


def jensen_shannon(beta: float) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        p, q = both(student, teacher, temperature)
        m = beta * p + (1 - beta) * q
        return temperature**2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))

    return value


def skew_forward(skew: float) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        p, q = both(student, teacher, temperature)
        return temperature**2 * kl(p, skew * p + (1 - skew) * q)

    return value


def skew_reverse(skew: float) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        p, q = both(student, teacher, temperature)
        return temperature**2 * kl(q, (1 - skew) * p + skew * q)

    return value


def total_variation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = both(student, teacher, temperature)
    return temperature * (p - q).abs().sum(-1) / 2


def adaptive(head: float) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        p, q = both(student, teacher, temperature)
        weights = []
        for ours, theirs in zip(q.detach(), p, strict=True):  # token by token, as the paper says it
            order = theirs.argsort(descending=True).tolist()
            mass, chosen = 0.0, []
            for token in order:
                mass += theirs[token].item()
                if chosen and mass > head:
                    break
                chosen.append(token)
            gap = (theirs - ours).abs()
            weights.append(gap[chosen].sum() / gap.sum())
        share = torch.stack(weights)
        return temperature**2 * (share * kl(p, q) + (1 - share) * kl(q, p))

    return value


def alpha_beta(a: float, b: float) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        p, q = both(student, teacher, temperature)
        inner = p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)
        return -(temperature**2) / (a * b) * inner.sum(-1)

    return value


def top_k(k: int, of: Formula) -> Formula:
    def value(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        kept = teacher.topk(k, -1).indices
        buckets = []
        for logits in (student, teacher):
            p = F.softmax(logits / temperature, -1).gather(1, kept)
            buckets.append(torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(0)], -1).log() * temperature)
        return of(buckets[0], buckets[1], temperature)

    return value


def universal(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p, q = both(student, teacher, temperature)
    return temperature * (p.sort(-1).values - q.sort(-1).values).abs().sum(-1)


FORMULAS: dict[str, tuple[Callable[[float], Any], Formula]] = {
    "forward": (ForwardKL, forward),
    "reverse": (ReverseKL, reverse),
    "jensen_shannon 0.5": (lambda t: JensenShannon(t, beta=0.5), jensen_shannon(0.5)),
    "jensen_shannon 0.1": (lambda t: JensenShannon(t, beta=0.1), jensen_shannon(0.1)),
    "jensen_shannon 0": (lambda t: JensenShannon(t, beta=0.0), forward),
    "jensen_shannon 1": (lambda t: JensenShannon(t, beta=1.0), reverse),
    "skew_forward": (lambda t: SkewForwardKL(t, skew=0.1), skew_forward(0.1)),
    "skew_reverse": (lambda t: SkewReverseKL(t, skew=0.3), skew_reverse(0.3)),
    "total_variation": (TotalVariation, total_variation),
    "adaptive": (AdaptiveKL, adaptive(0.5)),
    "alpha_beta": (lambda t: AlphaBeta(t, alpha=0.2, beta=0.7), alpha_beta(0.2, 0.7)),
    "alpha_beta 1 1": (lambda t: AlphaBeta(t, alpha=1.0, beta=1.0), alpha_beta(1.0, 1.0)),
    "top_k forward": (lambda t: TopK(5, ForwardKL(t)), top_k(5, forward)),
    "top_k jensen_shannon": (lambda t: TopK(3, JensenShannon(t)), top_k(3, jensen_shannon(0.5))),
    "top_k of all": (lambda t: TopK(VOCABULARY, ReverseKL(t)), reverse),
    "universal": (UniversalLogit, universal),
}
CONF = Path(__file__).resolve().parents[2] / "conf"
CHOICES = sorted(path.stem for path in (CONF / "divergence").glob("*.yaml"))


@cache
def chosen(name: str) -> Any:
    """As conf/divergence/<name>.yaml has it; a number of kept tokens fits this file's small vocabulary."""
    with initialize_config_dir(version_base=None, config_dir=str(CONF)):
        made = instantiate(compose(overrides=[f"+divergence@it={name}"]).it)
    return dataclasses.replace(made, k=5) if getattr(made, "k", 0) >= VOCABULARY else made


def at_temperature(divergence: Any, temperature: float) -> Any:
    """The same divergence at another temperature, which may be that of one inside of it."""
    values = {field.name: getattr(divergence, field.name) for field in dataclasses.fields(divergence)}
    if "temperature" in values:
        return dataclasses.replace(divergence, temperature=temperature)
    inner = {name: at_temperature(each, temperature) for name, each in values.items() if dataclasses.is_dataclass(each)}
    return dataclasses.replace(divergence, **inner)


def make_chosen(name: str, temperature: float) -> Any:
    return at_temperature(chosen(name), temperature)


def is_weighed(divergence: Any) -> bool:
    """Whether a factor of its value is a constant to the gradient, by definition."""
    return bool(getattr(getattr(divergence, "divergence", divergence), "weighed", False))


# By name: its own file's, and those that formulas are written for.
DIVERGENCES: dict[str, Callable[[float], Any]] = {
    **{f"conf: {name}": partial(make_chosen, name) for name in CHOICES},
    **{name: make for name, (make, _) in FORMULAS.items()},
}
named = pytest.mark.parametrize("name", DIVERGENCES)
with_formula = pytest.mark.parametrize("name", FORMULAS)


def dense(case: Case, formula: Formula, temperature: float) -> list[Tensor]:
    student, teacher, _ = case.dense_logits()
    total = formula(student, teacher, temperature).sum()
    return [total, *torch.autograd.grad(total, case.inputs)]


@with_formula
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("chunk_tokens", [4, None])
def test_value_and_gradient_equal_the_dense_formula(name: str, temperature: float, chunk_tokens: int | None) -> None:
    make, formula = FORMULAS[name]
    case = Case()
    total, _, gradients = case.run(make(temperature), chunk_tokens=chunk_tokens)
    assert_close([total, *gradients], dense(case, formula, temperature), 1e-9)


@with_formula
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
def test_low_precision_follows_fp64(name: str, dtype: torch.dtype, tolerance: float) -> None:
    make, formula = FORMULAS[name]
    case = Case(dtype, spread=1.0)
    total, _, gradients = case.run(make(2.0), chunk_tokens=4)
    assert_close([total, *gradients], dense(case, formula, 2.0), tolerance)
    assert total.dtype == torch.float32
    assert all(gradient.dtype == dtype for gradient in gradients)


@named
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
def test_of_a_model_with_itself_it_is_zero_with_zero_gradient(
    name: str, dtype: torch.dtype, temperature: float
) -> None:
    make = DIVERGENCES[name]
    case = Case(dtype, bias=False)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    total, _, gradients = case.run(make(temperature), chunk_tokens=4)
    epsilon = 1e-13 if dtype == torch.float64 else 1e-6
    assert abs(total.item()) <= epsilon * temperature**2
    for gradient in gradients:
        assert gradient.abs().max() <= 10 * epsilon * temperature


@named
def test_of_a_model_with_itself_it_is_zero_under_autocast_too(name: str) -> None:
    """Both heads' products are rounded alike, whatever dtype the teacher is kept in."""
    make = DIVERGENCES[name]
    case = Case(torch.float32, bias=False)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    with torch.autocast("cpu", torch.bfloat16):
        total, _, gradients = case.run(make(1.0), chunk_tokens=4)
    assert abs(total.item()) <= 1e-6
    assert all(gradient.abs().max() <= 1e-5 for gradient in gradients)


@named
def test_it_is_never_negative_and_positive_where_the_models_differ(name: str) -> None:
    make = DIVERGENCES[name]
    for spread in (0.01, 1.0, 8.0):
        total, _, _ = Case(torch.float32, spread=spread).run(make(1.0))
        assert total > 0


def logits(seed: int, rows: int = 5, columns: int = VOCABULARY) -> Tensor:
    return 3 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_logits(divergence: Any, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Value per token, and its gradient by the student's logits."""
    block = Block(student, torch.zeros(len(student), dtype=torch.long), 1.0, torch.zeros_like(student), teacher)
    return divergence.add(block), block.gradient_NV


absent_columns = given(
    absent=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=VOCABULARY - 2, unique=True),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)


@named
@absent_columns
def test_a_column_of_minus_infinity_in_both_models_is_absent(
    name: str, absent: list[int], temperature: float, dtype: torch.dtype
) -> None:
    """Truth: the same divergence of the models without those columns."""
    divergence = DIVERGENCES[name](temperature)
    student, teacher = logits(1), logits(2)
    kept = [column for column in range(VOCABULARY) if column not in absent]
    student[:, absent] = teacher[:, absent] = -math.inf
    if isinstance(divergence, TopK) and divergence.k >= len(kept):
        alone = divergence.divergence  # of so few columns all are kept apart
    else:
        alone = divergence
    values, gradient = of_logits(divergence, student.to(dtype), teacher.to(dtype))
    expected, expected_gradient = of_logits(alone, student[:, kept], teacher[:, kept])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    assert_close([values.double(), gradient[:, kept].double()], [expected, expected_gradient], tolerance)
    assert not gradient[:, absent].any()


INFINITE = ("reverse", "adaptive", "jensen_shannon 1", "top_k of all")


@with_formula
@absent_columns
def test_a_column_of_minus_infinity_in_the_teacher_has_probability_zero(
    name: str, absent: list[int], temperature: float, dtype: torch.dtype
) -> None:
    """Truth: the dense formula in fp64; in PyTorch's own KL 0 · log 0 is 0. Reverse KL is infinite, not NaN."""
    make, formula = FORMULAS[name]
    student, teacher = logits(1), logits(2)
    teacher[:, absent] = -math.inf
    values, gradient = of_logits(make(temperature), student.to(dtype), teacher.to(dtype))
    if name in INFINITE:
        assert (values == math.inf).all()
        return
    assert values.isfinite().all()
    assert gradient.isfinite().all()
    if dtype == torch.float64:
        leaf = student.clone().requires_grad_()
        expected = formula(leaf, teacher, temperature)
        assert_close([values, gradient], [expected.detach(), *torch.autograd.grad(expected.sum(), leaf)], 1e-9)


@named
def test_every_divergence_of_a_teacher_with_impossible_tokens_is_a_number_or_infinite(name: str) -> None:
    student, teacher = logits(1), logits(2)
    teacher[:, 3:6] = -math.inf
    values, gradient = of_logits(DIVERGENCES[name](1.0), student, teacher)
    assert not values.isnan().any()
    assert gradient.isfinite().all() or (values == math.inf).all()


def test_a_student_that_says_zero_makes_forward_kl_infinite_and_the_bounded_ones_not() -> None:
    student, teacher = logits(1), logits(2)
    student[:, 4] = -math.inf
    assert (of_logits(ForwardKL(1.0), student, teacher)[0] == math.inf).all()
    leaf = student.clone().requires_grad_()
    for name in ("reverse", "jensen_shannon 0.5", "skew_forward", "skew_reverse", "total_variation", "alpha_beta 1 1"):
        make, formula = FORMULAS[name]
        values, gradient = of_logits(make(1.0), student, teacher)
        assert_close([values], [formula(leaf, teacher, 1.0).detach()], 1e-9)
        assert gradient.isfinite().all()


@named
@pytest.mark.parametrize("gap", [200.0, 3e4])
def test_logits_far_apart_give_numbers(name: str, gap: float) -> None:
    make = DIVERGENCES[name]
    case = Case(torch.float32)
    with torch.no_grad():
        case.weight.mul_(gap / 4)
    total, _, gradients = case.run(make(1.0))
    assert math.isfinite(total.item())
    assert all(gradient.isfinite().all() for gradient in gradients)


@named
def test_finite_differences_agree_with_the_gradient(name: str) -> None:
    make = DIVERGENCES[name]
    if is_weighed(make(2.0)):
        pytest.skip("no gradient flows through its weights, by definition")
    case = Case(softcap=5.0, scale=1.3)
    _, _, gradients = case.run(make(2.0), chunk_tokens=5)
    for at, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        values = []
        for step in (1e-6, -1e-6):
            moved = Case(softcap=5.0, scale=1.3)
            with torch.no_grad():
                moved.inputs[at].add_(direction, alpha=step)
            values.append(moved.run(make(2.0), chunk_tokens=3)[0])
        assert_close([(gradient * direction).sum()], [(values[0] - values[1]) / 2e-6], 1e-6)


def test_only_adaptive_kl_is_excused_from_finite_differences() -> None:
    assert {make(1.0).name for make in DIVERGENCES.values() if is_weighed(make(1.0))} == {"adaptive_kl"}


def block_of(case: Case, weight: float = 1.0, divided: float = 1.0) -> Block:
    student, teacher, targets = (each.detach() for each in case.dense_logits())
    return Block(student / divided, targets, weight, torch.zeros_like(student), teacher / divided)


@named
@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_a_temperature_divides_both_models_logits_and_is_offset_by_its_power(name: str, temperature: float) -> None:
    make = DIVERGENCES[name]
    block, divided = block_of(Case()), block_of(Case(), divided=temperature)
    values, plain = make(temperature).add(block), make(1.0).add(divided)
    divergence = make(temperature)
    order = getattr(divergence, "divergence", divergence).order
    assert_close([values], [plain * temperature**order], 1e-9)
    assert_close([block.gradient_NV], [divided.gradient_NV * temperature ** (order - 1)], 1e-9)


@named
def test_at_high_temperatures_the_value_no_longer_changes(name: str) -> None:
    make = DIVERGENCES[name]
    assert_close([make(2e3).add(block_of(Case()))], [make(1e3).add(block_of(Case()))], 1e-2)


@named
def test_a_term_adds_its_weighted_gradient_to_what_is_there(name: str) -> None:
    divergence = DIVERGENCES[name](2.0)
    whole, part, none = block_of(Case()), block_of(Case(), weight=0.25), block_of(Case(), weight=0.0)
    part.gradient_NV.fill_(1.0)
    values = [divergence.add(block) for block in (whole, part, none)]
    assert torch.equal(values[0], values[1])
    assert torch.equal(values[0], values[2])
    assert_close([part.gradient_NV - 1], [0.25 * whole.gradient_NV], 1e-9)


@named
def test_chunks_of_tokens_give_what_all_at_once_gives(name: str) -> None:
    make, case = DIVERGENCES[name], Case()
    total, _, gradients = case.run(make(2.0), chunk_tokens=1000)
    for size in (1, 4):
        again, _, others = case.run(make(2.0), chunk_tokens=size)
        assert_close([again, *others], [total, *gradients], 1e-12)


@pytest.mark.parametrize(
    ("name", "share"),
    [("forward", 1), ("reverse", 1), ("jensen_shannon 0.5", 0.25), ("skew_forward", 0.9**2), ("skew_reverse", 0.7**2)]
    + [("adaptive", 1), ("top_k of all", 1)],
)
def test_at_a_high_temperature_it_tends_to_its_share_of_the_logits_mean_square(name: str, share: float) -> None:
    """T² · D tends to share · Var(difference of logits) / 2 over the vocabulary, share being D'' at p = q."""
    make = DIVERGENCES[name]
    case = Case()
    student, teacher, _ = case.dense_logits()
    limit = (teacher - student).var(-1, correction=0).sum() / 2
    total, _, _ = case.run(make(1e4))
    assert_close([total], [share * limit], 1e-3)


def test_jensen_shannons_limits_are_the_kls() -> None:
    case = Case(spread=0.5)
    for beta, limit in ((1e-8, ForwardKL(1.0)), (1 - 1e-8, ReverseKL(1.0))):
        total, _, gradients = case.run(JensenShannon(1.0, beta=beta))
        expected, _, expected_gradients = case.run(limit)
        share = min(beta, 1 - beta)
        assert_close([each / share for each in (total, *gradients)], [expected, *expected_gradients], 1e-3)


def test_alpha_betas_limits_are_the_kls() -> None:
    case = Case(spread=0.5)
    for a, b, limit in ((1.0, 1e-6, ForwardKL(1.0)), (1e-6, 1.0, ReverseKL(1.0))):
        total, _, gradients = case.run(AlphaBeta(1.0, alpha=a, beta=b))
        expected, _, expected_gradients = case.run(limit)
        assert_close([total, *gradients], [expected, *expected_gradients], 1e-4)


def test_a_little_skew_is_the_plain_kl() -> None:
    case = Case(spread=0.5)
    for kind, limit in ((SkewForwardKL, ForwardKL(1.0)), (SkewReverseKL, ReverseKL(1.0))):
        total, _, _ = case.run(kind(1.0, skew=1e-7))
        expected, _, _ = case.run(limit)
        assert_close([total], [expected], 1e-4)


def test_the_skews_and_jensen_shannon_are_bounded() -> None:
    case = Case(spread=1000.0)
    tokens = (case.targets >= 0).sum().item()
    for divergence in (SkewForwardKL(1.0, skew=0.1), SkewReverseKL(1.0, skew=0.1)):
        assert case.run(divergence)[0] <= -math.log(0.1) * tokens
    assert case.run(JensenShannon(1.0))[0] <= math.log(2) * tokens
    assert case.run(TotalVariation(1.0))[0] <= tokens


def test_top_k_is_at_most_the_whole_and_grows_with_k() -> None:
    case = Case()
    values = [case.run(TopK(k, ForwardKL(1.0)))[0].item() for k in (1, 4, 10, VOCABULARY)]
    assert values == sorted(values)
    assert values[-1] == pytest.approx(case.run(ForwardKL(1.0))[0].item())


def test_log_mix_is_exact_at_zero_and_does_not_overflow() -> None:
    ratio = torch.tensor([[0.0, 1e-6, 5.0, 200.0, -200.0]])
    expected = torch.log(0.3 + 0.7 * ratio.double().exp())
    assert log_mix(0.7, ratio)[0, 0] == 0
    torch.testing.assert_close(log_mix(0.7, ratio).double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReverseKL(0.0), "temperature=0.0"),
        (lambda: ReverseKL(float("nan")), "temperature=nan"),
        (lambda: ReverseKL(weight=-1.0), "weight=-1.0"),
        (lambda: JensenShannon(beta=1.5), "beta=1.5"),
        (lambda: SkewForwardKL(skew=0.0), "skew=0.0"),
        (lambda: SkewReverseKL(skew=1.0), "skew=1.0"),
        (lambda: AdaptiveKL(head=0.0), "head=0.0"),
        (lambda: AlphaBeta(alpha=0.0), "the limit is reverse_kl"),
        (lambda: AlphaBeta(beta=0.0), "the limit is forward_kl"),
        (lambda: TopK(0, ForwardKL()), "k=0"),
    ],
)
def test_values_that_make_no_divergence_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
