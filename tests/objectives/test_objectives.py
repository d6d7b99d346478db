"""The objectives against dense formulas in fp64, and the engine against what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.objectives import chunked
from models.objectives.block import Block
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Adapter, Head
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Dense, Sampled, TopK
from models.objectives.softmax import softmax
from tests.objectives.largest_tensor import LargestTensor

ROOT = Path(__file__).resolve().parents[2]
ROWS, LENGTH, VOCABULARY, WIDTH, TEACHER_WIDTH = 3, 7, 23, 5, 6


class Case:
    """Random hidden states, heads and targets; a third of the targets is masked."""

    def __init__(
        self,
        dtype: torch.dtype = torch.float64,
        *,
        bias: bool = True,
        scale: float = 1.0,
        softcap: float | None = None,
        spread: float = 2.0,
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        self.hidden = random(ROWS, LENGTH, WIDTH).requires_grad_()
        self.weight = (spread * random(VOCABULARY, WIDTH)).requires_grad_()
        self.bias = random(VOCABULARY).requires_grad_() if bias else None
        self.teacher_hidden = random(ROWS, LENGTH, TEACHER_WIDTH)
        self.teacher_weight = random(VOCABULARY, TEACHER_WIDTH)
        self.targets = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
        self.targets[torch.rand(ROWS, LENGTH, generator=generator) < 0.3] = -100
        self.scale, self.softcap = scale, softcap

    @property
    def head(self) -> Head:
        return Head(self.weight, self.bias, self.scale, self.softcap)

    @property
    def teacher_head(self) -> Head:
        return Head(self.teacher_weight, None, self.scale, self.softcap)

    @property
    def signal(self) -> Dense:
        return Dense(self.teacher_hidden, self.teacher_head)

    @property
    def inputs(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]

    def run(self, objective: Any, **words: Any) -> tuple[Tensor, dict[str, Tensor], list[Tensor]]:
        """Value, its parts, and the gradients of what has some."""
        total, parts = objective_sum(objective, self.hidden, self.head, self.targets, self.signal, **words)
        return total, parts, list(torch.autograd.grad(total, self.inputs))

    def dense_logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the supervised tokens, in fp64, by autograd's own operations: student, teacher, targets."""
        kept = self.targets != -100
        logits = [
            F.linear(hidden[kept].double(), weight.double(), None if bias is None else bias.double()) * self.scale
            for hidden, weight, bias in (
                (self.hidden, self.weight, self.bias),
                (self.teacher_hidden, self.teacher_weight, None),
            )
        ]
        if self.softcap is not None:
            logits = [self.softcap * torch.tanh(each / self.softcap) for each in logits]
        return logits[0], logits[1], self.targets[kept]


def dense(case: Case, alpha: float, temperature: float) -> tuple[Tensor, list[Tensor]]:
    """PyTorch's own cross_entropy and kl_div on whole logits, and autograd's gradients."""
    student, teacher, targets = case.dense_logits()
    hard = F.cross_entropy(student, targets, reduction="sum")
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    total = alpha * hard + (1 - alpha) * temperature**2 * soft
    return total, list(torch.autograd.grad(total, case.inputs))


def assert_close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, other in zip(got, expected, strict=True):
        assert (mine.double() - other.double()).abs().max() <= tolerance * other.abs().max().clamp_min(1e-30)


@pytest.mark.parametrize(
    "logits", [{}, {"bias": False}, {"scale": 0.3}, {"softcap": 4.0}, {"scale": 1.7, "softcap": 3.0}]
)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 1.0), (0.3, 2.0), (0.5, 4.0), (1.0, 2.0)])
def test_value_and_gradient_equal_the_dense_formula(logits: dict[str, Any], alpha: float, temperature: float) -> None:
    case = Case(**logits)
    total, parts, gradients = case.run(Distillation(alpha, ForwardKL(temperature)), chunk_tokens=4)
    expected, expected_gradients = dense(case, alpha, temperature)
    assert_close([total, *gradients], [expected, *expected_gradients], 1e-12)
    soft = parts.get("forward_kl", 0)  # not even asked for at alpha = 1
    assert_close([alpha * parts["cross_entropy"] + (1 - alpha) * soft], [expected], 1e-12)


@pytest.mark.parametrize("chunk_tokens", [1, 2, 5, 13, 1000, None])
@pytest.mark.parametrize("block_tokens", [1, 3, 1000])
def test_chunk_and_block_sizes_change_nothing(
    chunk_tokens: int | None, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(chunked._BLOCK_BYTES, "cpu", block_tokens * 4 * VOCABULARY)
    case = Case(scale=0.7, softcap=5.0)
    total, _, gradients = case.run(Distillation(0.4, ForwardKL(2.0)), chunk_tokens=chunk_tokens)
    expected, expected_gradients = dense(case, 0.4, 2.0)
    assert_close([total, *gradients], [expected, *expected_gradients], 1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_low_precision_follows_fp64(dtype: torch.dtype, tolerance: float) -> None:
    case = Case(dtype)
    total, parts, gradients = case.run(Distillation(0.5, ForwardKL(2.0)), chunk_tokens=4)
    expected, expected_gradients = dense(case, 0.5, 2.0)
    assert_close([total, *gradients], [expected, *expected_gradients], tolerance)
    assert all(part.dtype == torch.float32 for part in (total, *parts.values()))
    assert all(gradient.dtype == dtype for gradient in gradients)


def test_under_autocast_the_products_are_bf16_and_the_gradients_of_fp32_masters_fp32() -> None:
    case = Case(torch.float32, bias=False)
    expected, expected_gradients = dense(case, 0.5, 2.0)
    case.teacher_hidden, case.teacher_weight = case.teacher_hidden.bfloat16(), case.teacher_weight.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        total, _, gradients = case.run(Distillation(0.5, ForwardKL(2.0)), chunk_tokens=4)
    assert_close([total, *gradients], [expected, *expected_gradients], 3e-2)
    assert total != expected
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 20.0])
def test_forward_kl_of_a_model_with_itself_is_zero_with_zero_gradient(dtype: torch.dtype, temperature: float) -> None:
    case = Case(dtype, bias=False)
    case.teacher_hidden, case.teacher_weight = case.hidden.detach(), case.weight.detach()
    total, _, gradients = case.run(ForwardKL(temperature), chunk_tokens=4)
    assert total == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_alpha_1_is_exactly_cross_entropy_and_alpha_0_exactly_the_divergence() -> None:
    case = Case(torch.float32)
    divergence = ForwardKL(2.0)
    for alpha, alone in ((1.0, CrossEntropy()), (0.0, divergence)):
        total, _, gradients = case.run(Distillation(alpha, divergence))
        expected, _, expected_gradients = case.run(alone)
        assert total == expected
        assert all(torch.equal(mine, other) for mine, other in zip(gradients, expected_gradients, strict=True))


def test_at_a_high_temperature_the_divergence_is_half_the_variance_of_the_difference_of_logits() -> None:
    case = Case()
    total, _, _ = case.run(ForwardKL(1e4))
    student, teacher, _ = case.dense_logits()
    assert_close([total], [(teacher - student).var(-1, correction=0).sum() / 2], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_finite_differences_agree_with_the_gradient(dtype: torch.dtype) -> None:
    case = Case(dtype, softcap=5.0, scale=1.3)
    objective = Distillation(0.4, ForwardKL(2.0))
    _, _, gradients = case.run(objective)
    doubled = Case(torch.float64, softcap=5.0, scale=1.3)
    for at, gradient in enumerate(gradients):
        direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(at), dtype=torch.float64)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                doubled.inputs[at].copy_(case.inputs[at].double() + step * direction)
            values.append(doubled.run(objective)[0])
        with torch.no_grad():
            doubled.inputs[at].copy_(case.inputs[at])
        assert_close(
            [(gradient.double() * direction).sum()],
            [(values[0] - values[1]) / 2e-5],
            1e-8 if dtype == torch.float64 else 1e-5,
        )


def test_a_batch_without_supervised_tokens_gives_zero_and_zero_gradients() -> None:
    case = Case()
    case.targets.fill_(-100)
    total, parts, gradients = case.run(Distillation(0.5, ForwardKL()))
    assert total == 0
    assert all(part == 0 for part in parts.values())
    assert all((gradient == 0).all() for gradient in gradients)


def test_what_stands_at_masked_positions_changes_nothing() -> None:
    case = Case()
    objective = Distillation(0.5, ForwardKL())
    total, _, gradients = case.run(objective)
    masked = case.targets == -100
    assert masked.any()
    assert (gradients[0][masked] == 0).all()
    with torch.no_grad():
        case.hidden[masked] += 100
        case.teacher_hidden[masked] -= 100
    again, _, gradients_again = case.run(objective)
    assert again == total
    assert all(torch.equal(*pair) for pair in zip(gradients, gradients_again, strict=True))


@pytest.mark.parametrize(("student_extra", "teacher_extra"), [(0, 4), (9, 0), (9, 4)])
def test_padded_vocabulary_columns_change_nothing(student_extra: int, teacher_extra: int) -> None:
    plain, padded = Case(), Case()
    with torch.no_grad():
        for name, extra in (("weight", student_extra), ("bias", student_extra), ("teacher_weight", teacher_extra)):
            table = getattr(padded, name)
            rows = torch.full((extra, *table.shape[1:]), 7.0, dtype=table.dtype)
            setattr(padded, name, torch.cat([table, rows]).requires_grad_(table.requires_grad))
    objective = Distillation(0.5, ForwardKL())
    total, _, gradients = plain.run(objective)
    got, _, padded_gradients = padded.run(objective, vocabulary=VOCABULARY)
    assert_close(
        [got, *(gradient[: len(other)] for gradient, other in zip(padded_gradients, gradients, strict=True))],
        [total, *gradients],
        1e-12,
    )
    assert all((gradient[VOCABULARY:] == 0).all() for gradient in padded_gradients[1:])


def test_heads_of_different_width_without_a_shared_vocabulary_are_refused() -> None:
    case = Case()
    case.teacher_weight = case.teacher_weight[:-1]
    with pytest.raises(ValueError, match="student head has 23 columns and teacher head 22"):
        case.run(ForwardKL())


def test_a_divergence_without_a_teacher_is_refused() -> None:
    case = Case()
    with pytest.raises(ValueError, match="needs a teacher"):
        objective_sum(ForwardKL(), case.hidden, case.head, case.targets)


def test_the_teacher_gets_no_gradient() -> None:
    case = Case()
    case.teacher_hidden.requires_grad_()
    case.teacher_weight.requires_grad_()
    objective_sum(Distillation(0.5, ForwardKL()), case.hidden, case.head, case.targets, case.signal)[0].backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None


def test_no_tensor_is_larger_than_a_chunk_of_logits() -> None:
    tokens, width, vocabulary, chunk_tokens = 96, 4, 512, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    with LargestTensor() as largest:
        total, _ = objective_sum(
            Distillation(0.5, ForwardKL()),
            hidden,
            Head(weight, softcap=9.0, scale=0.5),
            targets,
            Dense(torch.randn(tokens, width), Head(torch.randn(vocabulary, width))),
            chunk_tokens=chunk_tokens,
        )
        total.backward()
    assert largest.elements == chunk_tokens * vocabulary < tokens * vocabulary


class Recorder:
    """A term that computes nothing and remembers the weight it was given."""

    name, needs_teacher = "recorder", False

    def __init__(self) -> None:
        self.weights: list[float] = []

    @property
    def terms(self) -> list[tuple[float, Any]]:
        return [(0.5, self)]

    @property
    def representations(self) -> list[Any]:
        return []

    def add(self, block: Block) -> Tensor:
        self.weights.append(block.weight)
        return block.student_NV.new_zeros(len(block.student_NV))


def test_without_a_graph_no_gradient_is_worked_out() -> None:
    case, recorder = Case(), Recorder()
    with torch.no_grad():
        objective_sum(recorder, case.hidden, case.head, case.targets)
    assert recorder.weights == [0.0]
    objective_sum(recorder, case.hidden, case.head, case.targets)
    assert recorder.weights == [0.0, 0.5]


def test_a_second_backward_is_refused_and_not_wrong() -> None:
    case = Case()
    total, _ = objective_sum(CrossEntropy(), case.hidden, case.head, case.targets)
    (total / 3).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (total / 3).backward()


def test_softmax_gives_the_normaliser_without_overflow() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-3e4, -3e4, -3e4], [0.1, 0.2, 0.3]])
    probabilities, normaliser = softmax(logits)
    assert torch.allclose(probabilities.double(), torch.softmax(logits.double(), -1))
    assert torch.allclose(normaliser, torch.logsumexp(logits.double(), -1))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature={temperature}"):
        ForwardKL(temperature)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_an_alpha_outside_0_to_1_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        Distillation(alpha, ForwardKL())


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_value_and_gradients_are_those_of_the_cpu_in_fp64(dtype: torch.dtype, tolerance: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    objective, case = Distillation(0.3, ForwardKL(2.0)), Case(spread=1.0)
    truth, _ = objective_sum(objective, case.hidden, case.head, case.targets, case.signal)
    expected = torch.autograd.grad(truth, case.inputs)
    moved = [t.detach().to("cuda", dtype).requires_grad_() for t in case.inputs]
    value, _ = objective_sum(
        objective,
        moved[0],
        Head(moved[1], moved[2]),
        case.targets.cuda(),
        Dense(case.teacher_hidden.to("cuda", dtype), Head(case.teacher_weight.to("cuda", dtype))),
    )
    torch.testing.assert_close(value.double().cpu(), truth, rtol=tolerance, atol=tolerance)
    for mine, theirs in zip(torch.autograd.grad(value, moved), expected, strict=True):
        torch.testing.assert_close(mine.double().cpu(), theirs, rtol=tolerance, atol=10 * tolerance)


def test_weights_multiply_values_and_gradients_token_by_token() -> None:
    case = Case(softcap=5.0)
    weights = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    objective = Distillation(0.3, ForwardKL(2.0))
    got = objective_sum(objective, case.hidden, case.head, case.targets, case.signal, weights=weights, chunk_tokens=4)
    student, teacher, targets = case.dense_logits()
    hard = F.cross_entropy(student, targets, reduction="none")
    soft = 4 * F.kl_div(
        F.log_softmax(student / 2, -1), F.log_softmax(teacher / 2, -1), reduction="none", log_target=True
    ).sum(-1)
    kept = weights[case.targets != -100]
    expected = (kept * (0.3 * hard + 0.7 * soft)).sum()
    truth = torch.autograd.grad(expected, case.inputs)
    assert_close([got[0], *torch.autograd.grad(got[0], case.inputs)], [expected, *truth], 1e-12)
    assert_close(list(got[1].values()), [(kept * hard).sum(), (kept * soft).sum()], 1e-12)


def test_weights_of_one_change_nothing() -> None:
    case = Case(torch.float32)
    total, _, gradients = case.run(ForwardKL())
    again, _, same = case.run(ForwardKL(), weights=torch.ones(ROWS, LENGTH))
    assert again == total
    assert all(torch.equal(*pair) for pair in zip(gradients, same, strict=True))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_a_low_rank_adapter_on_the_head_is_its_product_added_to_the_weight(frozen: bool, softcap: float | None) -> None:
    case = Case(softcap=softcap)
    generator = torch.Generator().manual_seed(5)
    down = torch.nn.Linear(WIDTH, 2, bias=False, dtype=torch.float64)
    up = torch.randn(VOCABULARY, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    case.weight.requires_grad_(not frozen)
    head = Head(case.weight, case.bias, 1.0, softcap, Adapter(down, up))
    objective = Distillation(0.3, ForwardKL(2.0))
    total, _ = objective_sum(objective, case.hidden, head, case.targets, case.signal, chunk_tokens=4)
    inputs = [case.hidden, case.bias, down.weight, up] + ([] if frozen else [case.weight])
    got = torch.autograd.grad(total, inputs)
    merged = Head(case.weight + up @ down.weight, case.bias, 1.0, softcap)  # by autograd's own product
    expected, _ = objective_sum(objective, case.hidden, merged, case.targets, case.signal, chunk_tokens=4)
    assert_close([total, *got], [expected, *torch.autograd.grad(expected, inputs)], 1e-12)


def test_a_frozen_head_gets_no_gradient_and_takes_no_memory_for_one() -> None:
    hidden, weight = torch.randn(8, 4, requires_grad=True), torch.randn(512, 4)
    with LargestTensor() as largest:
        total, _ = objective_sum(CrossEntropy(), hidden, Head(weight), torch.zeros(8, dtype=torch.long), chunk_tokens=1)
        total.backward()
    assert largest.elements == weight.numel()  # a view of the head itself; a gradient would be as large, and fp32
    assert weight.grad is None
    assert hidden.grad is not None


def test_a_tied_head_collects_the_gradients_of_both_its_uses() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=generator)
    total, _ = objective_sum(CrossEntropy(), torch.tanh(F.embedding(ids, table)), Head(table), ids, chunk_tokens=4)
    expected = F.cross_entropy(torch.tanh(table[ids]).reshape(-1, WIDTH) @ table.T, ids.reshape(-1), reduction="sum")
    assert_close([total, *torch.autograd.grad(total, table)], [expected, *torch.autograd.grad(expected, table)], 1e-12)


@pytest.mark.parametrize("megabytes", [1, 8])
def test_a_memory_budget_bounds_the_buffers(megabytes: int) -> None:
    tokens, width, vocabulary = 512, 4, 4096
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    signal = Dense(torch.randn(tokens, width), Head(torch.randn(vocabulary, width)))
    with LargestTensor() as largest:
        objective_sum(
            Distillation(0.5, ForwardKL()),
            hidden,
            Head(weight),
            torch.randint(vocabulary, (tokens,)),
            signal,
            memory_bytes=megabytes * 2**20,
        )
    assert 3 * 4 * largest.elements <= megabytes * 2**20  # logits of both models, and gradients
    assert 3 * 4 * (largest.elements + 2 * vocabulary) > megabytes * 2**20  # and no smaller than need be


def compare_compiled() -> None:
    for divergence in (ForwardKL(2.0), JensenShannon(1.0)):
        case = Case(torch.float32)
        objective = Distillation(0.5, divergence)
        total, parts, gradients = case.run(objective, chunk_tokens=4)
        again, other_parts, same = case.run(objective, chunk_tokens=4, compiled=True)
        assert_close([again, *same, *other_parts.values()], [total, *gradients, *parts.values()], 1e-5)


def test_compiled_terms_give_the_same() -> None:
    # In a process without this suite's type checks, which the compiler would trace as well.
    command = "from tests.objectives.test_objectives import compare_compiled; compare_compiled(); print('the same')"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "the same", done.stderr


def test_sparse_signals_hold_no_tokens_times_vocabulary_either() -> None:
    tokens, width, vocabulary, chunk_tokens = 96, 4, 512, 8
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocabulary, width, requires_grad=True)
    ids = torch.rand(tokens, vocabulary).topk(4).indices
    logits = torch.randn(tokens, 4)
    for signal in (
        TopK(ids, logits, {1.0: torch.zeros(tokens)}),
        Sampled(ids, torch.full((tokens, 4), 0.25), torch.zeros(tokens), 1.0),
    ):
        with LargestTensor() as largest:
            total, _ = objective_sum(
                Distillation(0.5, ForwardKL(1.0)),
                hidden,
                Head(weight),
                torch.randint(vocabulary, (tokens,)),
                signal,
                chunk_tokens=chunk_tokens,
            )
            total.backward()
        assert largest.elements == chunk_tokens * vocabulary


def test_several_terms_share_the_logits_and_keep_their_own_sums() -> None:
    case = Case()
    objective = Distillation(0.25, ForwardKL(2.0), {"more": ReverseKL(1.0, weight=0.5)})
    total, parts, _ = case.run(objective)
    alone = {term.name: case.run(term)[0] for term in (CrossEntropy(), ForwardKL(2.0), ReverseKL(1.0))}
    assert_close(list(parts.values()), [alone[name] for name in parts], 1e-12)
    assert_close(
        [total], [0.25 * alone["cross_entropy"] + 0.75 * alone["forward_kl"] + 0.5 * alone["reverse_kl"]], 1e-12
    )
