"""Dependency groups of every family: nothing left out, nothing twice, and a pruned model that equals the masked one."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.load import empty_model
from models.pruning.groups import Anatomy, anatomy_of
from models.pruning.surgery import Kept, pruned_state, silence, silent_experts, smaller_config
from tests.pruning.families import FAMILIES, FIXED_HEADS, LAYER_NORMS, config_of, model_of, tokens

KEPT = {"mlp": 0.8, "heads": 0.5, "experts": 0.75, "hidden": 0.75, "layers": 0.67}


def some(anatomy: Anatomy, kind: str, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {
        group.name: np.sort(draw.permutation(group.units)[: max(1, round(KEPT[kind] * group.units))])
        for group in anatomy.of(kind)
    }


def cases(anatomy: Anatomy, family: str) -> list[str]:
    kinds = [kind for kind in KEPT if anatomy.of(kind)]
    return [
        kind
        for kind in kinds
        if not (kind == "heads" and family in FIXED_HEADS) and not (kind == "hidden" and family in LAYER_NORMS)
    ]


def opened(config: Any, state: dict[str, torch.Tensor]) -> Any:
    eager = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}  # fp64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, **eager)
    model.load_state_dict(state)
    return model.eval()


def masked_state(model: Any, anatomy: Anatomy, kept: Kept) -> dict[str, torch.Tensor]:
    silent = copy.deepcopy(model)
    silence(silent, anatomy, kept)
    found: dict[str, torch.Tensor] = silent.state_dict()
    return found


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_model_is_the_masked_one(family: str, tied: bool) -> None:
    model = model_of(family, tie_word_embeddings=tied)
    anatomy, ids, state = anatomy_of(model), tokens(), model.state_dict()
    whole = opened(model.config, state)
    for kind in cases(anatomy, family):
        kept = some(anatomy, kind)
        config, _ = smaller_config(model.config, anatomy, kept)
        cut = logits(opened(config, pruned_state(state, anatomy, kept)), ids)
        silent = opened(model.config, masked_state(model, anatomy, kept))
        with silent_experts(silent, anatomy, kept):
            masked = logits(silent, ids)
        # RMSNorm computes in fp32, whatever the dtype, and the folded scales round there.
        assert (cut - masked).abs().max() < (1e-5 if kind == "hidden" else 1e-9), kind
        assert (masked - logits(whole, ids)).abs().max() > 0.1, kind


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_removed_has_no_say(family: str) -> None:
    """Other numbers in the places of removed units, where nothing masks them but the silence of what they feed."""
    model = model_of(family)
    anatomy, ids = anatomy_of(model), tokens()
    for kind in cases(anatomy, family):
        if kind == "layers":
            continue
        kept = some(anatomy, kind)
        state = masked_state(model, anatomy, kept)
        changed = {name: tensor.clone() for name, tensor in state.items()}
        for name, units in kept.items():
            group = anatomy.groups[name]
            removed = np.setdiff1d(np.arange(group.units), units)
            for axis in group.axes:
                if not axis.silences:
                    tensor = changed[axis.parameter] if axis.slot is None else changed[axis.parameter][axis.slot]
                    dim = axis.dim - (axis.slot is not None)
                    tensor.index_fill_(dim, torch.from_numpy(axis.places[removed].ravel()), 7.0)
        made = [opened(model.config, each) for each in (state, changed)]
        with silent_experts(made[0], anatomy, kept):
            one = logits(made[0], ids)
        with silent_experts(made[1], anatomy, kept):
            other = logits(made[1], ids)
        assert (one - other).abs().max() < 1e-9, kind


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_place_belongs_to_one_unit_and_every_axis_of_the_stream_to_the_stream(family: str, tied: bool) -> None:
    """Counted from the shapes alone: the widths here tell apart which dimension is whose."""
    model = empty_model(config_of(family, tie_word_embeddings=tied))
    anatomy = anatomy_of(model)
    for group in anatomy.groups.values():
        seen: Counter[tuple[str, int, int | None, int]] = Counter()
        for axis in group.axes:
            assert len(axis.places) == group.units
            seen.update((axis.parameter, axis.dim, axis.slot, int(place)) for place in axis.places.ravel())
        assert set(seen.values()) <= {1}, group.name
    streams = {(axis.parameter, axis.dim) for axis in anatomy.groups["hidden"].axes}
    for name, parameter in model.named_parameters():
        for dim, width in enumerate(parameter.shape):
            if width == anatomy.hidden and not (anatomy.heads * anatomy.head_dim == anatomy.hidden and dim_is_heads(
                name, dim, anatomy
            )):  # fmt: skip
                assert (name, dim) in streams, name
    for group in anatomy.of("mlp"):
        assert {axis.parameter for axis in group.axes if axis.silences}
    assert len(anatomy.of("heads")) == anatomy.layers


def dim_is_heads(name: str, dim: int, anatomy: Anatomy) -> bool:
    return any(
        (axis.parameter, axis.dim) == (name, dim) and axis.places.size == anatomy.hidden
        for group in anatomy.of("heads")
        for axis in group.axes
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_no_bit(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy = anatomy_of(model)
    kept = {name: np.arange(group.units) for name, group in anatomy.groups.items() if family not in LAYER_NORMS}
    made = pruned_state(model.state_dict(), anatomy, kept)
    for name, tensor in model.state_dict().items():
        assert torch.equal(made[name], tensor), name


def test_neurons_in_another_order_are_other_indices_and_the_same_model() -> None:
    model = model_of("llama")
    anatomy = anatomy_of(model)
    group = anatomy.of("mlp")[0]
    order = np.random.default_rng(1).permutation(group.units)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for axis in group.axes:
        where = torch.from_numpy(axis.places[order].ravel())
        state[axis.parameter] = state[axis.parameter].index_select(axis.dim, where)
    kept = some(anatomy, "mlp")
    permuted = {**kept, group.name: np.sort(np.argsort(order)[kept[group.name]])}
    config, _ = smaller_config(model.config, anatomy, kept)
    one = opened(config, pruned_state(model.state_dict(), anatomy, kept))
    other = opened(config, pruned_state(state, anatomy, permuted))
    assert (logits(one, tokens()) - logits(other, tokens())).abs().max() < 1e-9


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "mixtral"])
def test_a_cut_model_opens_plainly_generates_and_takes_padding(family: str, tmp_path: Path) -> None:
    model = model_of(family, dtype=torch.float32)
    anatomy = anatomy_of(model)
    kept = {**some(anatomy, "mlp"), **some(anatomy, "heads"), **some(anatomy, "layers")}
    kept = {name: units[: len(units) // 4 * 4] if "mlp" in name else units for name, units in kept.items()}
    config, _ = smaller_config(model.config, anatomy, kept)
    cut = AutoModelForCausalLM.from_config(config)
    cut.load_state_dict(pruned_state(model.state_dict(), anatomy, kept))
    cut.save_pretrained(tmp_path)
    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert back.config.num_hidden_layers == 2
    ids = tokens(1, 7)
    words = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = back.generate(ids, attention_mask=torch.ones_like(ids), **words)
    assert torch.equal(cached, back.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **words))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 7)], dim=1)
    assert torch.equal(back.generate(padded, attention_mask=mask, **words)[:, 10:], cached[:, 7:])


def test_llama_with_heads_that_its_config_cannot_say_is_saved_as_mistral_and_computes_the_same() -> None:
    model = model_of("llama", num_key_value_heads=4)
    anatomy = anatomy_of(model)
    kept: Kept = {group.name: np.array([0, 2, 3]) for group in anatomy.of("heads")}
    config, said = smaller_config(model.config, anatomy, kept)
    assert (config.model_type, config.sliding_window, config.head_dim) == ("mistral", None, 8)
    assert "Mistral" in said
    cut = logits(opened(config, pruned_state(model.state_dict(), anatomy, kept)), tokens())
    masked = logits(opened(model.config, masked_state(model, anatomy, kept)), tokens())
    assert (cut - masked).abs().max() < 1e-9


@pytest.mark.parametrize("family", FIXED_HEADS)
def test_heads_of_a_family_without_a_width_of_a_head_are_refused(family: str) -> None:
    anatomy = anatomy_of(empty_model(config_of(family)))
    with pytest.raises(Refusal, match=f"cannot be expressed by a {family} config") as refused:
        smaller_config(config_of(family), anatomy, some(anatomy, "heads"))
    assert "\n" not in str(refused.value)
    if family in LAYER_NORMS:
        with pytest.raises(Refusal, match="LayerNorm"):
            pruned_state(empty_model(config_of(family)).state_dict(), anatomy, some(anatomy, "hidden"))


def test_layers_of_unlike_widths_are_refused() -> None:
    anatomy = anatomy_of(empty_model(config_of("llama")))
    kept = {"layers.0.mlp": np.arange(12), "layers.1.mlp": np.arange(16), "layers.2.mlp": np.arange(16)}
    with pytest.raises(Refusal, match="between 12 and 16 remain in different layers"):
        smaller_config(config_of("llama"), anatomy, kept)


@pytest.mark.parametrize(
    ("family", "values", "named"),
    [
        (
            "olmo2",
            {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4},
            "norm",
        ),
        ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}, "h.0"),
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2}, "no attention heads"),
    ],
)
def test_a_family_that_is_not_understood_is_refused_by_the_name_of_its_part(
    family: str, values: dict[str, Any], named: str
) -> None:
    from transformers import AutoConfig

    with pytest.raises(Refusal, match=named) as refused:
        anatomy_of(empty_model(AutoConfig.for_model(family, vocab_size=61, **values)))
    assert "\n" not in str(refused.value)
