"""Scales that are folded leave every family what it is, and are folded wherever something can take them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.layerwise import Turn, in_turn
from models.matrices import chosen
from models.pruning.groups import anatomy_of
from models.quantization.folding import Fold, fold, folds
from models.quantization.methods.smoothquant import SmoothQuant
from models.quantization.scheme import WeightScheme
from tests.pruning.families import FAMILIES, model_of, tokens

MOE = ("mixtral", "qwen3_moe")
QKV, GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
LLAMA = {
    "input_layernorm": QKV,
    "post_attention_layernorm": GATED,
    "v_proj": ("o_proj",),
    "up_proj": ("down_proj",),
}
OPT = {
    "self_attn_layer_norm": QKV,
    "final_layer_norm": ("fc1",),
    "v_proj": ("out_proj",),
    "fc1": ("fc2",),
}
NEOX = {
    "input_layernorm": ("query_key_value",),
    "post_attention_layernorm": ("dense_h_to_4h",),
    "query_key_value": ("dense",),
}
MIXTURE = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ("gate_up_proj",) * 4,
    "v_proj": ("o_proj",),
    "gate_up_proj": ("down_proj",),
}
# What gives → what reads. Of a GELU's inputs nothing can be taken out again.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA),
    "gemma2": {
        "input_layernorm": QKV, "pre_feedforward_layernorm": GATED, "v_proj": ("o_proj",), "up_proj": ("down_proj",),
    },
    "phi3": {
        "input_layernorm": ("qkv_proj",), "post_attention_layernorm": ("gate_up_proj",), "qkv_proj": ("o_proj",),
        "gate_up_proj": ("down_proj",),
    },
    "gpt2": {"ln_1": ("c_attn",), "ln_2": ("c_fc",), "c_attn": ("c_proj",)},
    "gpt_neox": NEOX,
    "opt": OPT,
    **dict.fromkeys(MOE, MIXTURE),
}  # fmt: skip
OTHERS: dict[str, tuple[str, dict[str, Any], dict[str, tuple[str, ...]]]] = {
    "one after the other": ("gpt_neox", {"use_parallel_residual": False}, NEOX),
    "GELU": ("opt", {"activation_function": "gelu"}, {k: v for k, v in OPT.items() if k != "fc1"}),
    # There each norm's result goes on as the stream itself, beside the matrices that read it.
    "norms of the stream": ("opt", {"do_layer_norm_before": False}, {"v_proj": ("out_proj",), "fc1": ("fc2",)}),
    "one KV head": ("llama", {"num_key_value_heads": 1}, LLAMA),
}


def phi() -> Any:
    """Attention and MLP read one norm, side by side."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "phi", vocab_size=61, hidden_size=32, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double().eval()


def first_turn(model: Any) -> Turn:
    return next(in_turn(model, [tokens()]))


def matrices_of(model: Any, layer: int, skip: tuple[str, ...] = ()) -> list[Any]:
    return [matrix for matrix in chosen(model, skip, "skip") if matrix.layer == layer]


def short(name: str) -> str:
    return name.rpartition(".")[2]


def check_folded(model: Any, expected: dict[str, tuple[str, ...]], tolerance: float) -> None:
    ids = tokens()
    with torch.no_grad():
        before = model(ids).logits
    anatomy, states = anatomy_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    draw = torch.Generator().manual_seed(2)
    for turn in in_turn(model, [ids]):
        found = folds(anatomy, turn, matrices_of(model, turn.number))
        assert {short(each.giver_name): tuple(short(r.name) for r in each.readers) for each in found} == expected
        for each in found:
            each.apply(turn.layer, 0.3 + 3 * torch.rand(len(each.rows_K), generator=draw))
            prefix = f"{anatomy.prefix}.{turn.number}"
            given = [n for n, _ in turn.layer.named_parameters() if n in (each.giver_name, f"{each.giver_name}.bias")]
            given += [n for n, _ in turn.layer.named_parameters() if n == f"{each.giver_name}.weight"]
            read = [r.name if r.slot is not None else f"{r.name}.weight" for r in each.readers]
            assert given
            for name in [*given, *read, *(f"{router}.weight" for router in each.routers)]:
                assert (model.get_parameter(f"{prefix}.{name}") - states[f"{prefix}.{name}"]).abs().max() > 0.01, name
    with torch.no_grad():
        assert (model(ids).logits - before).abs().max() < tolerance


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folded_model_is_the_same_function(family: str, tied: bool) -> None:
    model = model_of(family, dtype=torch.float32 if family in MOE else torch.float64, tie_word_embeddings=tied)
    # Gemma's norms give fp32, whatever the dtype.
    check_folded(model, EXPECTED[family], 1e-5 if family in (*MOE, "gemma", "gemma2") else 1e-12)


@pytest.mark.parametrize("case", OTHERS)
def test_so_are_those_of_other_shapes(case: str) -> None:
    family, values, expected = OTHERS[case]
    check_folded(model_of(family, **values), expected, 1e-12)


def test_one_norm_that_attention_and_mlp_read_is_folded_into_both() -> None:
    check_folded(phi(), {"input_layernorm": (*QKV, "fc1"), "v_proj": ("dense",)}, 1e-12)


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ("k_proj", {"post_attention_layernorm", "v_proj", "up_proj"}),
        ("v_proj", {"post_attention_layernorm", "up_proj"}),
        ("down_proj", {"input_layernorm", "post_attention_layernorm", "v_proj"}),
    ],
)
def test_a_matrix_that_is_skipped_is_left_alone_with_all_that_shares_a_scale_with_it(skip: str, left: set[str]) -> None:
    model = model_of("llama")
    found = folds(anatomy_of(model), first_turn(model), matrices_of(model, 0, (skip,)))
    assert {short(each.giver_name) for each in found} == left


def test_half_precision_is_no_reason_to_fold_less_or_more() -> None:
    for family, expected in (("llama", LLAMA), ("gpt2", EXPECTED["gpt2"])):
        model = model_of(family, dtype=torch.bfloat16)
        found = folds(anatomy_of(model), first_turn(model), matrices_of(model, 0))
        assert {short(each.giver_name) for each in found} == set(expected)


def test_query_heads_share_the_scales_of_the_values_they_read() -> None:
    model = model_of("llama")  # two KV heads of width 8, read by two query heads each
    found = folds(anatomy_of(model), first_turn(model), matrices_of(model, 0))
    values = next(each for each in found if each.giver_name == "self_attn.v_proj")
    assert values.rows_K.tolist() == list(range(16))
    heads = values.channel_I.view(4, 8).tolist()
    assert heads == [list(range(8)), list(range(8)), list(range(8, 16)), list(range(8, 16))]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_said_to_be_read_is_what_the_folded_layer_reads(family: str) -> None:
    model = model_of(family, dtype=torch.float32)
    turn = next(in_turn(model, [tokens(8, 40)]))
    method = SmoothQuant()
    before = {name: each.detach().clone() for name, each in turn.layer.named_parameters() if each.ndim == 1}
    said = fold(
        anatomy_of(model), turn, matrices_of(model, 0), turn.read(method.reading), method.scales, WeightScheme()
    )
    now = turn.read(method.reading)
    assert said.keys() == now.keys()
    assert ("mlp.experts.down_proj[3]" in now) == (family == "mixtral")
    for name in now:
        torch.testing.assert_close(said[name].largest_I, now[name].largest_I, rtol=1e-4, atol=1e-5)
    changed = {name for name, each in before.items() if not torch.equal(turn.layer.get_parameter(name), each)}
    assert changed == {"input_layernorm.weight", "post_attention_layernorm.weight"}


def test_a_fold_and_its_inverse_leave_nothing_behind() -> None:
    layer = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(4)}).double()
    with torch.no_grad():
        layer["norm"].bias += 1
    every = torch.arange(4)
    scale = torch.tensor([0.5, 2.0, 4.0, 0.25])
    each = Fold("norm", every, (), every)
    each.apply(layer, scale)
    assert layer["norm"].weight.tolist() == layer["norm"].bias.tolist() == [2.0, 0.5, 0.25, 4.0]
    each.apply(layer, 1 / scale)
    assert layer["norm"].weight.tolist() == [1.0] * 4
