"""Quantization schemes against the formulas they are named for, and at their edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.errors import Refusal
from models.quantization.methods.clipped import Clipped
from models.quantization.methods.gptq import GPTQ
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.scheme import WeightScheme

SCHEMES = [
    WeightScheme(bits, granularity, 8 if granularity == "group" else None, symmetric, dtype)
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


def parts(weight: torch.Tensor, scheme: WeightScheme) -> list[tuple[slice, slice]]:
    """What shares a scale."""
    everything = slice(None)
    if scheme.granularity == "tensor":
        return [(everything, everything)]
    width = scheme.group_size or weight.shape[1]
    rows = range(len(weight))
    return [(slice(r, r + 1), slice(c, c + width)) for r in rows for c in range(0, weight.shape[1], width)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_rounding_is_the_textbooks_for_all_that_share_a_scale(scheme: WeightScheme) -> None:
    weight = weights()
    want = torch.empty_like(weight)
    formula = symmetric if scheme.symmetric else asymmetric
    for part in parts(weight, scheme):
        want[part] = formula(weight[part], scheme.bits, getattr(torch, scheme.scale_dtype))
    made = RoundToNearest().quantized(weight, scheme, None)
    torch.testing.assert_close(made.dequantized(), want, rtol=1e-6, atol=1e-7)
    assert int(made.integers.min()) >= scheme.lowest
    assert int(made.integers.max()) <= scheme.highest
    assert torch.equal(made.scale, made.scale.to(getattr(torch, scheme.scale_dtype)).float())
    # What is on the scheme stays there, to the bit: training rounds again at every step.
    again = scheme.quantize(made.dequantized(), made.scale, made.zero_point)
    assert torch.equal(again.integers, made.integers)
    distance = (weight - made.dequantized()).abs()
    assert (
        float((distance / _spread(made.scale, weight)).max()) <= (0.5 if scheme.scale_dtype == "float32" else 1) + 1e-3
    )


def _spread(scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return scale.expand(len(weight) if len(scale) == 1 else -1, -1).repeat_interleave(
        weight.shape[1] // scale.shape[1], 1
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_edges(bits: int, is_symmetric: bool) -> None:
    scheme = WeightScheme(bits, "group", 4, is_symmetric, "float32")
    weight = torch.tensor([[0.0] * 4 + [0.75] * 4 + [-3.0] * 4 + [-1.0, 0.0, 0.0, 1.0]])
    made = RoundToNearest().quantized(weight, scheme, None)
    assert torch.isfinite(made.scale).all()
    assert (made.scale > 0).all()
    torch.testing.assert_close(made.dequantized()[:, :12], weight[:, :12])
    assert made.dequantized()[0, 13] == 0  # zero is on every scheme
    for bad in (float("nan"), float("inf")):
        with pytest.raises(Refusal, match="a weight is NaN or infinite"):
            RoundToNearest().quantized(torch.full((1, 4), bad), scheme, None)
    with pytest.raises(Refusal, match="beyond it; use bfloat16"):
        RoundToNearest().quantized(torch.full((1, 4), 1e7), WeightScheme(2, "group", 4, is_symmetric, "float16"), None)


@pytest.mark.parametrize("scheme", SCHEMES[::3], ids=str)
def test_a_clipped_range_costs_no_more_than_the_whole(scheme: WeightScheme) -> None:
    weight = weights()
    weight[0, 0] = 9.0  # an outlier
    whole, clipped = (method.quantized(weight, scheme, None) for method in (RoundToNearest(), Clipped()))
    for part in parts(weight, scheme):
        costs = [float((weight - made.dequantized())[part].square().sum()) for made in (whole, clipped)]
        assert costs[1] <= costs[0] * (1 + 1e-6)
    if scheme.bits <= 3 and scheme.granularity == "channel":
        assert (weight - clipped.dequantized()).norm() < 0.97 * (weight - whole.dequantized()).norm()


def brain_surgeon(weight: torch.Tensor, hessian: torch.Tensor, scheme: WeightScheme, order: list[int]) -> torch.Tensor:
    """GPTQ as OBQ: one column after another, the inverse of what is left worked out anew each time; in fp64."""
    w, h = weight.double().clone(), hessian.double()
    scale, zero_point = scheme.of_range(*scheme.ranges(weight))
    left, width = list(order), scheme.width(weight.shape[1])
    for column in order:
        if order == sorted(order) and column % width == 0:  # in their order groups are met whole, as they are by now
            now = scheme.of_range(*scheme.ranges(w.float()))
            if scheme.granularity == "group":
                scale[:, column // width], zero_point[:, column // width] = (each[:, column // width] for each in now)
        inverse = torch.linalg.inv(h[left][:, left])
        group = column // width
        made = scheme.quantize(w[:, column, None].float(), scale[:, group, None], zero_point[:, group, None])
        error = (w[:, column] - made.dequantized()[:, 0].double()) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        left = left[1:]
    return w.float()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_gptq_is_the_brain_surgeons_column_by_column(granularity: str, block: int, act_order: bool) -> None:
    weight, scheme = weights(), WeightScheme(4, granularity, 8 if granularity == "group" else None, True, "float32")
    method = GPTQ(block=block, act_order=act_order, clip=False)
    read = method.reading(24)
    text = inputs()
    read.add(text[:50])
    read.add(text[50:])
    damped = 2 * text.T @ text / len(text)
    damped += 0.01 * damped.diagonal().mean() * torch.eye(24)
    order = damped.diagonal().argsort(descending=True).tolist() if act_order else list(range(24))
    made = method.quantized(weight, scheme, read)
    want = brain_surgeon(weight, damped, scheme, order)
    torch.testing.assert_close(made.dequantized(), want, rtol=1e-4, atol=1e-5)


def inputs(tokens: int = 200, seed: int = 3) -> torch.Tensor:
    """Correlated, as those of a language model are."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 12, generator=draw) @ torch.randn(12, 24, generator=draw) + 0.1 * torch.randn(
        tokens, 24, generator=draw
    )


@pytest.mark.parametrize("scheme", [scheme for scheme in SCHEMES[::3] if scheme.bits < 8], ids=str)
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_gives_what_it_reads_with_less_error_than_rounding(scheme: WeightScheme, act_order: bool) -> None:
    weight, text = weights(), inputs()
    method: Any = GPTQ(act_order=act_order, clip=False)
    read = method.reading(24)
    read.add(text)
    errors = [
        float((text @ (weight - made.quantized(weight, scheme, read).dequantized()).T).norm())
        for made in (RoundToNearest(), method)
    ]
    assert errors[1] < errors[0]
    made = method.quantized(weight, scheme, read)
    assert int(made.integers.min()) >= scheme.lowest
    assert int(made.integers.max()) <= scheme.highest


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    weight, text = weights(), inputs()
    text[:, [2, 7]] = 0
    method = GPTQ(clip=False)
    read = method.reading(24)
    read.add(text)
    made = method.quantized(weight, WeightScheme(3, "channel", None), read)
    assert torch.isfinite(made.dequantized()).all()
    assert (made.dequantized()[:, [2, 7]] == 0).all()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WeightScheme(bits=1), "need 2 to 8"),
        (lambda: WeightScheme(granularity="row"), "need one of tensor, channel, group"),
        (lambda: WeightScheme(group_size=None), "a group needs a size"),
        (lambda: WeightScheme(granularity="channel"), "nothing else has one"),
        (lambda: WeightScheme(scale_dtype="float8"), "need one of float32"),
        (
            lambda: WeightScheme(group_size=128).check({"q_proj": 172}),
            r"has 172 inputs, .* need 4 or scheme.weights.granularity=channel",
        ),
        (
            lambda: WeightScheme(group_size=128).check({"0.q_proj.weight": 96, "0.up.weight": 128}),
            r"q_proj.weight has 96 .*group_size=null, or leave out those with quantize.skip=\[q_proj\]$",
        ),
        (
            lambda: WeightScheme(group_size=128).check({"q_proj": 96}),
            r"need 32 or 16 or 8 or 4 or \S+granularity=channel with scheme.weights.group_size=null$",
        ),
        (lambda: Clipped(steps=1), "need at least 2"),
        (lambda: GPTQ(damping=0.0), "need a number above 0"),
    ],
)
def test_what_is_no_scheme_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        make()
    assert "\n" not in str(refused.value)
