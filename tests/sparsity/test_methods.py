"""What becomes zero, against formulas written dense; and how much is lost by it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import Refusal
from models.sparsity.magnitude import Magnitude
from models.sparsity.method import Pattern, smallest
from models.sparsity.sparsegpt import Hessian, SparseGPT
from models.sparsity.wanda import Norms, Wanda

OUT, IN, TOKENS = 12, 24, 90
METHODS = [Magnitude(), Wanda(), SparseGPT(), SparseGPT(block=7)]


def case(seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix [O, I] and its activations [N, I], which are of unlike size and far from independent."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    mixed = draw(TOKENS, IN) @ (torch.eye(IN, dtype=torch.float64) + 0.5 * draw(IN, IN))
    return draw(OUT, IN), mixed * torch.linspace(0.2, 3, IN, dtype=torch.float64)


def read(method: Any, inputs: Tensor) -> Any:
    """As it comes from a model: in parts of unlike size."""
    if method.reading is None:
        return None
    reading = method.reading(inputs.shape[1])
    for part in inputs.split([10, 50, len(inputs) - 60]):
        reading.add(part)
    return reading


def test_what_is_read_in_parts_is_what_is_read_at_once() -> None:
    _, x = case()
    norms, hessian = read(Wanda(), x), read(SparseGPT(), x)
    assert isinstance(norms, Norms)
    assert isinstance(hessian, Hessian)
    torch.testing.assert_close(norms.squares_I.sqrt(), x.norm(dim=0))
    torch.testing.assert_close(hessian.mean_II, 2 * x.T @ x / len(x))


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.75])
def test_magnitude_is_the_quantile_of_absolute_weights(fraction: float) -> None:
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    mask = weight.abs() > torch.quantile(weight.abs(), fraction)
    (count,) = Magnitude().zeros([weight], fraction)
    assert torch.equal(Magnitude().sparsified(weight, count, None), weight * mask)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ties_do_not_change_how_many_weights_go(scope: str) -> None:
    weights = [torch.tensor([[1.0, -1.0, 1.0, 2.0]] * 5), torch.ones(3, 6), torch.tensor([[-0.5, 0.5]])]
    counts = Magnitude(scope).zeros(weights, 0.45)
    assert counts == {"layer": [9, 8, 1], "global": [15, 1, 2]}[scope]
    for weight, count in zip(weights, counts, strict=True):
        assert int((Magnitude().sparsified(weight, count, None) == 0).sum()) == count


@pytest.mark.parametrize("fraction", [0.13, 0.5, 0.9])
def test_a_global_threshold_is_that_of_all_matrices_laid_end_to_end(fraction: float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 8), 0.1 * torch.randn(9, 4), 3 * torch.randn(2, 70)]
    flat = torch.cat([weight.flatten() for weight in weights])
    want = flat.clone()
    want[flat.abs().argsort()[: round(fraction * len(flat))]] = 0
    counts = Magnitude("global").zeros(weights, fraction)
    got = [Magnitude("global").sparsified(w, n, None) for w, n in zip(weights, counts, strict=True)]
    assert torch.equal(torch.cat([weight.flatten() for weight in got]), want)


def test_wanda_compares_weight_times_input_norm_within_each_output() -> None:
    weight, x = case()
    want = weight.clone()
    for row in want:
        row[(row.abs() * x.norm(dim=0)).argsort()[: IN // 3]] = 0
    (count,) = Wanda().zeros([weight], 1 / 3)
    assert torch.equal(Wanda().sparsified(weight, count, read(Wanda(), x)), want)


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.5, 0.77])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_exactly_the_fraction_becomes_zero(method: Any, fraction: float) -> None:
    weight, x = case()
    (count,) = method.zeros([weight], fraction)
    assert count == round(fraction * weight.numel())
    assert int((method.sparsified(weight, count, read(method, x)) == 0).sum()) == count


@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "2:3", "11:12"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_group_of_neighbours_keeps_as_many_as_the_pattern_says(method: Any, text: str) -> None:
    weight, x = case()
    pattern = Pattern.parse(text)
    made = method.sparsified(weight, pattern, read(method, x))
    assert ((made != 0).view(OUT, -1, pattern.of).sum(-1) == pattern.kept).all()
    assert pattern.held(made)
    made[3, : pattern.of] = 1.0
    assert not pattern.held(made)


def test_a_pattern_takes_the_smallest_of_each_group() -> None:
    weight, x = case()
    for method, scores in ((Magnitude(), weight.abs()), (Wanda(), weight.abs() * x.norm(dim=0))):
        want = weight.clone()
        for row in range(OUT):
            for first in range(0, IN, 4):
                want[row, first + scores[row, first : first + 4].argsort()[:2]] = 0
        assert torch.equal(method.sparsified(weight, Pattern(2, 4), read(method, x)), want)


def surgeon(weight: Tensor, hessian: Tensor, zeros: int | Pattern, block: int) -> Tensor:
    """Column after column, the inverse of what is left of the Hessian written out each time."""
    inverses = [torch.linalg.inv(hessian)]
    for column in range(IN):
        last = inverses[-1]
        inverses.append(last - torch.outer(last[:, column], last[column]) / last[column, column])
    cost = torch.stack([inverses[column][column, column] for column in range(IN)])
    made, gone, done = weight.clone(), torch.zeros(OUT, IN, dtype=torch.bool), 0
    for column in range(IN):
        if isinstance(zeros, Pattern) and column % zeros.of == 0:
            group = slice(column, column + zeros.of)
            order = (made[:, group] ** 2 / cost[group]).argsort(dim=1)[:, : zeros.of - zeros.kept]
            gone[:, group] = gone[:, group].scatter(1, order, True)
        elif not isinstance(zeros, Pattern) and column % block == 0:
            group = slice(column, min(column + block, IN))
            count = round(zeros * group.stop / IN) - done
            chosen = (made[:, group] ** 2 / cost[group]).flatten().argsort()[:count]
            gone[:, group] = gone[:, group].flatten().index_fill(0, chosen, True).view(OUT, -1)
            done += count
        error = torch.where(gone[:, column], made[:, column], 0.0) / cost[column]
        made[:, column:] -= torch.outer(error, inverses[column][column, column:])
    return made.masked_fill(gone, 0)


@pytest.mark.parametrize("zeros", [144, 100, Pattern(2, 4), Pattern(4, 8)], ids=str)
@pytest.mark.parametrize("block", [128, 8, 5])
def test_sparsegpt_is_the_surgeon_with_explicit_inverses(zeros: Any, block: int) -> None:
    weight, x = case()
    hessian = 2 * x.T @ x / len(x)
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(IN, dtype=torch.float64)
    got = SparseGPT(block=block).sparsified(weight, zeros, read(SparseGPT(), x))
    torch.testing.assert_close(got, surgeon(weight, hessian, zeros, block), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zeros", [144, Pattern(2, 4)], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_what_sparsegpt_loses_lies_between_least_squares_and_magnitude(zeros: Any, seed: int) -> None:
    weight, x = case(seed)

    def loss(made: Tensor) -> float:
        return float(((made - weight) @ x.T).square().sum())

    made = SparseGPT().sparsified(weight, zeros, read(SparseGPT(), x))
    best = torch.zeros_like(weight)
    for row in range(OUT):
        left = made[row] != 0
        best[row, left] = torch.linalg.lstsq(x[:, left], x @ weight[row])[0]
    wanda = Wanda().sparsified(weight, zeros, read(Wanda(), x))
    magnitude = Magnitude().sparsified(weight, zeros, None)
    assert loss(best) <= loss(made) < loss(wanda) < loss(magnitude)


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=str)
def test_inputs_that_are_always_zero_go_first_and_spoil_nothing(method: Any) -> None:
    weight, x = case()
    x[:, [2, 9]] = 0
    made = method.sparsified(weight, OUT * 4, read(method, x))
    assert torch.isfinite(made).all()
    assert int((made == 0).sum()) == OUT * 4
    assert (made[:, [2, 9]] == 0).all()


def test_a_hessian_that_cannot_be_inverted_is_refused_in_one_line() -> None:
    weight, x = case()
    x[5, 3] = float("inf")
    with pytest.raises(Refusal, match=r"damping=0\.01: .* raise it to 0\.1") as refused:
        SparseGPT().sparsified(weight, 10, read(SparseGPT(), x))
    assert "\n" not in str(refused.value)


def test_the_smallest_of_more_values_than_a_quantile_takes() -> None:
    scores = torch.arange(17_000_000, dtype=torch.float32).flip(0) // 1000
    gone = smallest(scores, 8_500_500)
    assert int(gone.sum()) == 8_500_500
    assert scores[gone].max() <= scores[~gone].min()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wanda_of_half_precision_weights_ranks_in_float32(dtype: torch.dtype) -> None:
    """Some inputs of real models are so large that their norm is beyond float16."""
    draw = torch.Generator().manual_seed(0)
    weight, text = torch.randn(64, 128, generator=draw).to(dtype), torch.randn(50, 128, generator=draw)
    text[:, 3] *= 1e5
    weight[5, 3] = 0
    read = Wanda().reading(128)
    read.add(text)
    made = Wanda().sparsified(weight, 64 * 64, read)
    scores = weight.double().abs() * text.double().norm(dim=0)
    gone = scores.argsort(dim=1, stable=True)[:, :64]
    assert torch.equal(made == 0, torch.zeros(64, 128, dtype=torch.bool).scatter(1, gone, True) | (weight == 0))
