"""Grids against the formulas they are named for, and at their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import Refusal
from models.quantization.grid import Grid
from models.quantization.methods.clipped import Clipped
from models.quantization.methods.gptq import GPTQ
from models.quantization.methods.nearest import Nearest

GRIDS = [
    Grid(bits, granularity, 8 if granularity == "group" else None, symmetric, dtype)
    for bits in (2, 3, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
    for dtype in ("float32", "float16", "bfloat16")
]


def weights(outputs: int = 6, inputs: int = 24, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=draw) * torch.rand(outputs, 1, generator=draw) + 0.02


def symmetric(tensor: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The textbook's, of one tensor; the scale as its dtype holds it."""
    qmax = 2 ** (bits - 1) - 1
    scale = (tensor.abs().max() / qmax).to(dtype).float()
    return torch.round(tensor / scale).clamp(-qmax - 1, qmax) * scale


def asymmetric(tensor: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    qmax = 2**bits - 1
    low, high = tensor.min().clamp(max=0), tensor.max().clamp(min=0)
    scale = ((high - low) / qmax).to(dtype).float()
    zero_point = torch.round(-low / scale).clamp(0, qmax)
    return (torch.round(tensor / scale + zero_point).clamp(0, qmax) - zero_point) * scale


def parts(weight: torch.Tensor, grid: Grid) -> list[tuple[slice, slice]]:
    """What shares a scale."""
    everything = slice(None)
    if grid.granularity == "tensor":
        return [(everything, everything)]
    width = grid.group_size or weight.shape[1]
    rows = range(len(weight))
    return [(slice(r, r + 1), slice(c, c + width)) for r in rows for c in range(0, weight.shape[1], width)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_rounding_is_the_textbooks_for_all_that_share_a_scale(grid: Grid) -> None:
    weight = weights()
    want = torch.empty_like(weight)
    formula = symmetric if grid.symmetric else asymmetric
    for part in parts(weight, grid):
        want[part] = formula(weight[part], grid.bits, getattr(torch, grid.scale_dtype))
    made = Nearest().quantized(weight, grid, None)
    torch.testing.assert_close(made.dequantized(), want, rtol=1e-6, atol=1e-7)
    assert int(made.integers.min()) >= grid.lowest
    assert int(made.integers.max()) <= grid.highest
    assert torch.equal(made.scale, made.scale.to(getattr(torch, grid.scale_dtype)).float())
    # What is on the grid stays there, to the bit: training rounds again at every step.
    again = grid.nearest(made.dequantized(), made.scale, made.zero_point)
    assert torch.equal(again.integers, made.integers)
    distance = (weight - made.dequantized()).abs()
    assert float((distance / _spread(made.scale, weight)).max()) <= (0.5 if grid.scale_dtype == "float32" else 1) + 1e-3


def _spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale.expand(len(weight) if len(scale) == 1 else -1, -1).repeat_interleave(
        weight.shape[1] // scale.shape[1], 1
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_edges(bits: int, is_symmetric: bool) -> None:
    grid = Grid(bits, "group", 4, is_symmetric, "float32")
    weight = torch.tensor([[0.0] * 4 + [0.75] * 4 + [-3.0] * 4 + [-1.0, 0.0, 0.0, 1.0]])
    made = Nearest().quantized(weight, grid, None)
    assert torch.isfinite(made.scale).all()
    assert (made.scale > 0).all()
    torch.testing.assert_close(made.dequantized()[:, :12], weight[:, :12])
    assert made.dequantized()[0, 13] == 0  # zero is on every grid
    for bad in (float("nan"), float("inf")):
        with pytest.raises(Refusal, match="a weight is no number, or infinite"):
            Nearest().quantized(torch.full((1, 4), bad), grid, None)
    with pytest.raises(Refusal, match="beyond it; use bfloat16"):
        Nearest().quantized(torch.full((1, 4), 1e7), Grid(2, "group", 4, is_symmetric, "float16"), None)


@pytest.mark.parametrize("grid", GRIDS[::3], ids=str)
def test_a_clipped_range_costs_no_more_than_the_whole(grid: Grid) -> None:
    weight = weights()
    weight[0, 0] = 9.0  # an outlier
    whole, clipped = (method.quantized(weight, grid, None) for method in (Nearest(), Clipped()))
    for part in parts(weight, grid):
        costs = [float((weight - made.dequantized())[part].square().sum()) for made in (whole, clipped)]
        assert costs[1] <= costs[0] * (1 + 1e-6)
    if grid.bits <= 3 and grid.granularity == "channel":
        assert (weight - clipped.dequantized()).norm() < 0.97 * (weight - whole.dequantized()).norm()


def brain_surgeon(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, order: list[int]) -> torch.Tensor:
    """GPTQ as OBQ: one column after another, the inverse of what is left worked out anew each time; in fp64."""
    w, h = weight.double().clone(), hessian.double()
    scale, zero_point = grid.of_range(*grid.ranges(weight))
    left, width = list(order), grid.width(weight.shape[1])
    for column in order:
        if order == sorted(order) and column % width == 0:  # in their order groups are met whole, as they are by now
            now = grid.of_range(*grid.ranges(w.float()))
            if grid.granularity == "group":
                scale[:, column // width], zero_point[:, column // width] = (each[:, column // width] for each in now)
        inverse = torch.linalg.inv(h[left][:, left])
        group = column // width
        made = grid.nearest(w[:, column, None].float(), scale[:, group, None], zero_point[:, group, None])
        error = (w[:, column] - made.dequantized()[:, 0].double()) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return w.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_gptq_is_the_brain_surgeons_column_by_column(granularity: str, block: int, act_order: bool) -> None:
    weight, grid = weights(), Grid(4, granularity, 8 if granularity == "group" else None, True, "float32")
    method = GPTQ(block=block, act_order=act_order, clip=False)
    read = method.reading(24)
    text = inputs()
    read.add(text[:50])
    read.add(text[50:])
    damped = 2 * text.T @ text / len(text)
    damped += 0.01 * damped.diagonal().mean() * torch.eye(24)
    order = damped.diagonal().argsort(descending=True).tolist() if act_order else list(range(24))
    made = method.quantized(weight, grid, read)
    want = brain_surgeon(weight, damped, grid, order)
    torch.testing.assert_close(made.dequantized(), want, rtol=1e-4, atol=1e-5)


def inputs(tokens: int = 200, seed: int = 3) -> torch.Tensor:
    """Correlated, as those of a language model are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 12, generator=draw) @ torch.randn(12, 24, generator=draw) + 0.1 * torch.randn(
        tokens, 24, generator=draw
    )


@pytest.mark.parametrize("grid", [grid for grid in GRIDS[::3] if grid.bits < 8], ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_gives_what_it_reads_with_less_error_than_rounding(grid: Grid, act_order: bool) -> None:
    weight, text = weights(), inputs()
    method: Any = GPTQ(act_order=act_order, clip=False)
    read = method.reading(24)
    read.add(text)
    errors = [
        float((text @ (weight - made.quantized(weight, grid, read).dequantized()).T).norm())
        for made in (Nearest(), method)
    ]
    assert errors[1] < errors[0]
    made = method.quantized(weight, grid, read)
    assert int(made.integers.min()) >= grid.lowest
    assert int(made.integers.max()) <= grid.highest


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, text = weights(), inputs()
    text[:, [2, 7]] = 0
    method = GPTQ(clip=False)
    read = method.reading(24)
    read.add(text)
    made = method.quantized(weight, Grid(3, "channel", None), read)
    assert torch.isfinite(made.dequantized()).all()
    assert (made.dequantized()[:, [2, 7]] == 0).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Grid(bits=1), "need 2 to 8"),
        (lambda: Grid(granularity="row"), "need one of tensor, channel, group"),
        (lambda: Grid(group_size=None), "a group needs a size"),
        (lambda: Grid(granularity="channel"), "nothing else has one"),
        (lambda: Grid(scale_dtype="float8"), "need one of float32"),
        (lambda: Grid(group_size=128).check("q_proj", 172), r"reads 172 inputs, .* need 4 or granularity=channel"),
        (
            lambda: Grid(group_size=128).check("q_proj", 96),
            r"need 32 or 16 or 8 or 4 or granularity=channel with group_size=null, or leave it out",
        ),
        (lambda: Clipped(steps=1), "need at least 2"),
        (lambda: GPTQ(damping=0.0), "need a number above 0"),
    ],
)
def test_what_is_no_grid_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)
