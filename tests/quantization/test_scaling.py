"""AWQ and SmoothQuant against sums over tokens, written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from models.errors import Refusal
from models.hessian import Hessian
from models.quantization.activations import Largest
from models.quantization.methods.awq import AWQ, Magnitudes
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.methods.smoothquant import SmoothQuant
from models.quantization.scheme import WeightScheme

SCHEMES = [
    WeightScheme(bits, granularity, 8 if granularity == "group" else None, symmetric)
    for bits in (2, 4, 8)
    for granularity in ("tensor", "channel", "group")
    for symmetric in (True, False)
]


def weights(outputs: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(outputs, 24, generator=torch.Generator().manual_seed(seed))


def inputs(tokens: int = 80, seed: int = 1) -> Tensor:
    """Correlated, with a few channels far larger than the others, and one that is nothing."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 24, generator=draw) @ (torch.eye(24) + 0.2 * torch.randn(24, 24, generator=draw))
    x[:, [3, 9, 17]] *= 30
    x[:, 5] = 0
    return x


def gathered(x: Tensor) -> Magnitudes:
    read = Magnitudes(24)
    for part in x.split(33):
        read.add(part)
    return read


def rounded(weight: Tensor, scheme: WeightScheme) -> Tensor:
    return RoundToNearest().quantized(weight, scheme, None).dequantized()


def paper_scale(x: Tensor, ratio: float) -> Tensor:
    """As AWQ's own code norms it, over the channels that are read."""
    live = x.abs().mean(0) > 0
    scale = x.abs().mean(0).pow(ratio).clamp(min=1e-4)
    scale = scale / (scale[live].max() * scale[live].min()).sqrt()
    return torch.where(live, scale, torch.ones(()))


def damage(x: Tensor, weight: Tensor, scale: Tensor, scheme: WeightScheme) -> float:
    made = (x / scale) @ rounded(weight * scale, scheme).T
    return float((made - x @ weight.T).square().sum())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_awqs_scale_is_the_best_of_its_ratios_over_all_tokens(scheme: WeightScheme) -> None:
    x, both = inputs(), [weights(6), weights(9, seed=3)]
    read = gathered(x)
    found = AWQ().scales([(weight, read) for weight in both], torch.arange(24), scheme)
    costs = [sum(damage(x, w, paper_scale(x, step / 20), scheme) for w in both) for step in range(20)]
    mine = sum(damage(x, weight, found, scheme) for weight in both)
    assert mine == pytest.approx(min(costs), rel=1e-3)
    assert found[5] == 1
    torch.testing.assert_close(found, paper_scale(x, min(range(20), key=costs.__getitem__) / 20), rtol=1e-4, atol=0)
    if scheme.bits > 2 and scheme.granularity != "group":
        assert mine < 0.8 * costs[0]  # there is something to gain where channels are so unlike


def test_inputs_that_are_one_channel_have_one_scale_of_their_mean() -> None:
    x, weight, scheme = inputs(), weights(), WeightScheme(4, "channel", None)
    channel = torch.arange(24) % 12
    found = AWQ().scales([(weight, gathered(x))], channel, scheme)
    assert found.shape == (12,)
    together = x.abs().mean(0).view(2, 12).mean(0)
    costs, tried = [], []
    for step in range(20):
        scale = together.pow(step / 20).clamp(min=1e-4)
        tried.append(scale / (scale.max() * scale.min()).sqrt())
        costs.append(damage(x, weight, tried[-1][channel], scheme))
    torch.testing.assert_close(found, tried[min(range(20), key=costs.__getitem__)], rtol=1e-4, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_awqs_ranges_are_the_best_for_what_each_group_adds(scheme: WeightScheme) -> None:
    x, weight = inputs(), weights()
    made = AWQ().quantized(weight, scheme, gathered(x)).dequantized()
    width = scheme.width(24)

    def costs(values: Tensor) -> Tensor:
        """[O, G], or their sum over O where all share one scale."""
        parts = [
            (x[:, at : at + width] @ (values - weight)[:, at : at + width].T).square().sum(0)
            for at in range(0, 24, width)
        ]
        each = torch.stack(parts, 1)
        return each.sum(0, keepdim=True) if scheme.granularity == "tensor" else each

    low, high = scheme.ranges(weight)
    tried = [
        costs(scheme.quantize(weight, *scheme.of_range(share * low, share * high)).dequantized())
        for share in torch.linspace(1, 0.5, 21).tolist()
    ]
    torch.testing.assert_close(costs(made), torch.stack(tried).amin(0), rtol=1e-3, atol=1e-3)


def test_no_text_at_all_scales_nothing() -> None:
    x, weight = torch.zeros(4, 24), weights()
    assert (
        AWQ().scales([(weight, gathered(x))], torch.arange(24), WeightScheme(4, "channel", None)).tolist() == [1.0] * 24
    )


@pytest.mark.parametrize("groups", [1, 3, 24])
def test_a_hessians_cost_is_twice_the_mean_square_over_tokens(groups: int) -> None:
    x, error, hessian = inputs(), weights(), Hessian(24)
    for part in x.split(33):
        hessian.add(part)
    width = 24 // groups
    want = torch.stack(
        [(x[:, g : g + width] @ error[:, g : g + width].T).square().mean(0) * 2 for g in range(0, 24, width)], 1
    )
    torch.testing.assert_close(hessian.cost(error, groups), want, rtol=1e-4, atol=1e-4)


def test_what_is_gathered_is_divided_as_what_is_read() -> None:
    x, scale = inputs(), torch.rand(24, generator=torch.Generator().manual_seed(4)) + 0.2
    said, want = gathered(x).divided(scale), gathered(x / scale)
    torch.testing.assert_close(said.mean_I, want.mean_I)
    torch.testing.assert_close(said.hessian.mean_II, want.hessian.mean_II, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(want.mean_I, (x / scale).abs().mean(0))


def largest(x: Tensor) -> Largest:
    read = Largest(24)
    read.add(x)
    return read


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_smoothquants_scale_is_its_formula(strength: float) -> None:
    x, both = inputs(), [weights(6), weights(9, seed=3)]
    both[0][:, 7] = both[1][:, 7] = 0
    found = SmoothQuant(strength).scales(
        [(w, largest(x)) for w in both], torch.arange(24), WeightScheme(8, "channel", None)
    )
    of_weights = torch.cat(both).abs().amax(0)
    for j in range(24):
        want = 1.0 if j in (5, 7) else float(x[:, j].abs().max() ** strength / of_weights[j] ** (1 - strength))
        assert float(found[j]) == pytest.approx(want, rel=1e-5)
    if strength == 0.5:  # then inputs and weights are as hard to round
        live = [j for j in range(24) if j not in (5, 7)]
        torch.testing.assert_close(((x / found).abs().amax(0))[live], (of_weights * found)[live])


def test_smoothquants_channels_take_the_largest_of_their_inputs() -> None:
    x, weight = inputs(), weights()
    found = SmoothQuant().scales([(weight, largest(x))], torch.arange(24) % 12, WeightScheme(8, "channel", None))
    want = (x.abs().amax(0).view(2, 12).amax(0) / weight.abs().amax(0).view(2, 12).amax(0)).sqrt()
    torch.testing.assert_close(found, want)


def test_settings_that_make_no_sense_are_refused() -> None:
    nothing = Magnitudes(16)
    nothing.add(torch.full((3, 16), float("nan")))
    with pytest.raises(Refusal, match="quantizer=awq: activations are NaN or infinite"):
        AWQ().scales([(torch.randn(4, 16), nothing)], torch.arange(16), WeightScheme(4, "channel", None))
    with pytest.raises(Refusal, match=r"quantizer\.ratios=0: need at least 1"):
        AWQ(ratios=0)
    with pytest.raises(Refusal, match=r"quantizer\.strength=1\.5: need \[0, 1\]"):
        SmoothQuant(1.5)
