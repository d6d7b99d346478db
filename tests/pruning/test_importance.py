"""Scores against dense formulas: whole gradients of each sample, whole weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from models.errors import Refusal
from models.pruning.groups import Anatomy, anatomy_of
from models.pruning.importance import REDUCTIONS, gather
from models.pruning.importances.activation import Activation
from models.pruning.importances.attention_mass import AttentionMass
from models.pruning.importances.block_influence import BlockInfluence
from models.pruning.importances.fluctuation import Fluctuation
from models.pruning.importances.magnitude import Magnitude
from models.pruning.importances.random import Random
from models.pruning.importances.taylor import ORDERS, Taylor
from models.pruning.importances.wanda import Wanda
from tests.pruning.families import FAMILIES, model_of, tokens

SAMPLES, LENGTH = 4, 9
MOE = ("mixtral", "qwen3_moe")
KINDS = ("heads", "mlp")


def batch() -> dict[str, torch.Tensor]:
    ids = tokens(SAMPLES, LENGTH)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[1, 4:] = -100  # of a shorter text each token counts more
    return {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(SAMPLES, 1), "targets": targets}


def scored(importance: Any, model: Any, anatomy: Anatomy, kinds: Any, batches: Any) -> dict[str, np.ndarray]:
    return importance.scores(model, anatomy, kinds, gather(importance, model, anatomy, kinds, batches))


def gradients(model: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The mean over samples of the gradients of each one's mean loss, and of their squares."""
    mean = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    square = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    words = batch()
    for sample in range(SAMPLES):
        model.zero_grad()
        ids, targets = words["input_ids"][sample : sample + 1], words["targets"][sample]
        logits = model(ids).logits[0]
        torch.nn.functional.cross_entropy(logits, targets).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                mean[name] += parameter.grad / SAMPLES
                square[name] += parameter.grad**2 / SAMPLES
    model.zero_grad()
    return mean, square


def dense(anatomy: Anatomy, of: Any, reduction: str = "sum", signed: bool = False) -> dict[str, np.ndarray]:
    """Unit by unit, from whole tensors of values."""
    found = {}
    for group in anatomy.groups.values():
        if group.kind not in KINDS:
            continue
        rows = []
        for axis in group.axes:
            values = of(axis.parameter)
            if values is None:
                continue
            if axis.slot is not None:
                values = values[axis.slot]
            lines = values.detach().double().movedim(axis.dim - (axis.slot is not None), 0).flatten(1)
            of_places = lines.sum(1).abs() if signed else lines.abs().sum(1)
            rows.append([float(of_places[places].sum()) for places in axis.places])
        found[group.name] = REDUCTIONS[reduction](np.array(rows))
    return found


def same(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values, rtol=tolerance, atol=tolerance * np.abs(values).max())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_is_llm_pruners_from_whole_gradients_of_every_sample(family: str, order: str) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy = anatomy_of(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got = scored(Taylor(order), model, anatomy, KINDS, [batch()])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    g, a = gradients(model)
    w = dict(model.named_parameters())
    formulas = {
        "first": lambda name: w[name] * g[name],
        "second": lambda name: w[name] ** 2 * a[name],
        "mix": lambda name: w[name] * g[name] - w[name] ** 2 * a[name] / 2,
        "vectorize": lambda name: w[name] * g[name],
    }
    of = formulas[order]
    want = dense(anatomy, lambda name: of(name) if w[name].ndim > 1 else None, signed=order == "vectorize")
    same(got, want, 1e-4 if family in MOE else 1e-5)


def read_by(model: Any, parameter: str) -> torch.Tensor:
    """Activations that enter the module of a matrix, at the tokens that predict, by a hook of its own."""
    seen: list[torch.Tensor] = []
    module = model.get_submodule(parameter.rpartition(".")[0])
    handle = module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    words = batch()
    model(words["input_ids"])
    handle.remove()
    return seen[0].reshape(SAMPLES * LENGTH, -1)[(words["targets"] >= 0).flatten()].double()


@pytest.mark.parametrize("make", [Wanda, Activation, Fluctuation])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_units_give_is_measured_where_it_is_read(family: str, make: Any) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy = anatomy_of(model)
    if family in MOE:
        with pytest.raises(Refusal, match=r"the inputs of the experts of .* cannot be seen"):
            scored(make(), model, anatomy, KINDS, [batch()])
        return
    words = batch()
    halves = [{name: tensor[part] for name, tensor in words.items()} for part in (slice(0, 1), slice(1, 4))]
    got = scored(make(), model, anatomy, KINDS, halves)
    want = {}
    for group in anatomy.groups.values():
        if group.kind in KINDS:
            axis = next(axis for axis in group.axes if axis.silences)
            x = read_by(model, axis.parameter)
            w = model.get_parameter(axis.parameter).detach().double().movedim(axis.dim, 0)  # place by place
            each = {
                Wanda: lambda unit, x=x, w=w: (x[:, unit].norm(dim=0) * w[unit].abs().sum(1)).sum(),
                Activation: lambda unit, x=x: x[:, unit].square().sum(1).sqrt().mean(),
                Fluctuation: lambda unit, x=x, w=w: (x[:, unit].var(0, correction=0) * w[unit].square().sum(1)).sum(),
            }[make]
            want[group.name] = np.array([float(each(torch.from_numpy(unit))) for unit in axis.places])
    same(got, want, 1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neox", "phi3"])
def test_attention_is_what_queries_and_keys_make_it(family: str) -> None:
    """Against attention that is worked out anew from the queries and keys that PyTorch's fused attention is given."""
    model = model_of(family, dtype=torch.float32)
    anatomy, words = anatomy_of(model), batch()
    words["position_ids"][2] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])  # two texts in a row
    got = scored(AttentionMass(), model, anatomy, ("heads",), [words])
    assert model.config._attn_implementation == "sdpa"
    seen: list[tuple[torch.Tensor, ...]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def watched(query: Any, key: Any, value: Any, attn_mask: Any = None, **more: Any) -> torch.Tensor:
        seen.append((query, key, attn_mask, more.get("scale"), more.get("is_causal"), more.get("enable_gqa")))
        return plain(query, key, value, attn_mask=attn_mask, **more)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        model(words["input_ids"], position_ids=words["position_ids"], use_cache=False)
    real, elsewhere = words["targets"] >= 0, (words["position_ids"] != 0).double()
    for layer, (query, key, mask, scale, causal, _) in enumerate(seen):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query @ key.transpose(-1, -2)).double() * (scale or query.shape[-1] ** -0.5)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
        elif causal:
            logits = logits.masked_fill(~torch.ones(logits.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        mass = (logits.softmax(-1) @ elsewhere[:, None, :, None]).squeeze(-1)
        of_heads = (mass * real[:, None]).sum((0, 2)) / real.sum()
        want = of_heads.reshape(anatomy.kv_heads, -1).sum(1)
        np.testing.assert_allclose(got[f"layers.{layer}.heads"], want, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_layers_influence_is_what_it_turns(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    words = batch()
    with torch.no_grad():
        states = model(words["input_ids"], output_hidden_states=True).hidden_states
    got = scored(BlockInfluence(), model, anatomy_of(model), ("layers",), [words])["layers"]
    real = words["targets"] >= 0
    for number in range(2):  # the last state has passed the final norm too
        one, other = (state[real].double() for state in states[number : number + 2])
        cosine = (one * other).sum(-1) / one.norm(dim=-1) / other.norm(dim=-1)
        assert got[number] == pytest.approx(float((1 - cosine).mean()), rel=1e-4)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_units_matrices_are_brought_together_as_is_said(reduction: str) -> None:
    model = model_of("qwen2", dtype=torch.float32)
    anatomy, w = anatomy_of(model), dict(model.named_parameters())
    got = scored(Magnitude(power=1, reduction=reduction), model, anatomy, KINDS, [])
    same(got, dense(anatomy, lambda name: w[name] if w[name].ndim > 1 else None, reduction))


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_magnitude_is_the_sum_over_all_that_a_unit_has(family: str, power: int) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy, w = anatomy_of(model), dict(model.named_parameters())
    got = scored(Magnitude(power=power), model, anatomy, KINDS, [])
    same(got, dense(anatomy, lambda name: w[name].abs() ** power if w[name].ndim > 1 else None))


def test_taylor_foretells_what_the_loss_does_without_a_small_unit() -> None:
    """The finite difference: of a unit made faint, Σ w·g is how much the loss changes."""
    model = model_of("llama")
    anatomy = anatomy_of(model)
    words = batch()

    def loss() -> float:
        logits = model(words["input_ids"]).logits
        each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), words["targets"], reduction="none")
        return float((each.sum(1) / (words["targets"] >= 0).sum(1)).mean())

    got = scored(Taylor("vectorize", reduction="first"), model.float(), anatomy, ("mlp",), [words])
    model.double()
    axis = anatomy.groups["layers.1.mlp"].axes[0]
    assert axis.parameter.endswith("gate_proj.weight")
    weight, step = model.get_parameter(axis.parameter), 1e-2
    with torch.no_grad():
        for unit in (0, 7):
            row, losses = weight[unit].clone(), []
            for factor in (1 + step, 1 - step):
                weight[unit] = row * factor
                losses.append(loss())
            weight[unit] = row
            assert got["layers.1.mlp"][unit] == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("make", [Taylor, Wanda, Activation, Fluctuation, AttentionMass, BlockInfluence])
def test_what_was_gathered_apart_adds_up(make: Any) -> None:
    """Two files of statistics are one of both texts, and gathering goes on where it stopped."""
    model = model_of("llama", dtype=torch.float32)
    anatomy, words = anatomy_of(model), batch()
    kinds = [kind for kind in ("heads", "mlp", "layers") if kind in make().kinds]
    one, other = ({name: tensor[part] for name, tensor in words.items()} for part in (slice(0, 2), slice(2, 4)))
    kept: list[dict[str, np.ndarray]] = []
    both = gather(make(), model, anatomy, kinds, [one, other], after=lambda found: kept.append(dict(found)))
    resumed = gather(make(), model, anatomy, kinds, [other], before=kept[0])
    apart = [gather(make(), model, anatomy, kinds, [each]) for each in (one, other)]
    same(resumed, both, 0)
    same({name: apart[0][name] + apart[1][name] for name in both}, both, 1e-12)
    if make is Taylor:
        halves = [make().scores(model, anatomy, kinds, each) for each in apart]
        same(make().scores(model, anatomy, kinds, both), {n: (halves[0][n] + halves[1][n]) / 2 for n in halves[0]})


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_channels_of_the_stream_count_by_what_the_norms_let_through(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy, words = anatomy_of(model), batch()
    seen = []
    for name, module in model.named_modules():
        if name.endswith("layernorm") or name == "model.norm":
            module.register_forward_hook(lambda _, inputs, output: seen.append(output.detach()))
    got = scored(Activation(), model, anatomy, ("hidden",), [words])["hidden"]
    want = sum(each[words["targets"] >= 0].double().abs().mean(0) for each in seen[: 2 * 3 + 1])
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-5)


def test_random_scores_are_the_seeds() -> None:
    anatomy = anatomy_of(model_of("llama"))
    one, again, other = (scored(Random(seed), None, anatomy, KINDS, []) for seed in (0, 0, 1))
    same(one, again, 0)
    assert all((one[name] != other[name]).all() for name in one)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Taylor("third"), "need one of first, second, mix, vectorize"),
        (lambda: Taylor(reduction="median"), "need one of sum, mean"),
        (lambda: Magnitude(power=3), r"need 1 \(L1\) or 2"),
    ],
)
def test_what_is_no_importance_is_refused(make: Any, said: str) -> None:
    with pytest.raises(Refusal, match=said):
        make()
