"""Layer after layer, each reading what the changed ones before it give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.errors import Refusal
from models.layerwise import in_turn
from models.matrices import check_alone, matrices, of_no_kind
from models.representations import decoder_layers
from models.sparsity.magnitude import Magnitude
from models.sparsity.method import Pattern
from models.sparsity.sparsegpt import SparseGPT
from models.sparsity.wanda import Wanda
from models.sparsity.zeros import counted
from tests.pruning.families import FAMILIES, MIXTURES, model_of, tokens

MOE = ("mixtral", "qwen3_moe")


class Kept:
    def __init__(self, width: int) -> None:
        self.parts: list[Tensor] = []

    def add(self, read_NI: Tensor) -> None:
        self.parts.append(read_NI)


def precise(family: str) -> Any:
    return model_of(family, dtype=torch.float32 if family in MOE else torch.float64)


def in_a_whole_forward(model: Any, batches: list[Tensor], layer: int) -> dict[str, Tensor]:
    seen: dict[str, list[Tensor]] = {}

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))

    modules = [(n, m) for n, m in decoder_layers(model)[layer].named_modules() if hasattr(m, "bias")]
    handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in modules]
    with torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_layer_reads_is_what_the_model_with_its_first_layers_changed_gives_it(family: str) -> None:
    model = precise(family)
    batches = list(tokens(5, 11).split(2))
    found = matrices(model)
    for turn in in_turn(model, batches):
        got = turn.read(Kept)
        want = in_a_whole_forward(model, batches, turn.number)
        alone = {name: kept for name, kept in got.items() if "[" not in name}
        assert set(alone) == {m.name for m in found if m.layer == turn.number and m.slot is None}
        for name, kept in alone.items():  # what experts read is in tests/quantization/test_experts.py
            torch.testing.assert_close(torch.cat(kept.parts), want[name], rtol=0, atol=1e-5 if family in MOE else 1e-12)
        with torch.no_grad():
            for matrix in (m for m in found if m.layer == turn.number):
                matrix.of(model.get_parameter(matrix.parameter)).mul_(0.5)


def test_queries_keys_and_values_share_what_they_read() -> None:
    turn = next(in_turn(model_of("llama"), [tokens(2)]))
    got = turn.read(Kept)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    assert len({id(got[name]) for name in names}) == 1
    assert len(got["self_attn.q_proj"].parts) == 1
    assert len({id(kept) for kept in got.values()}) == 4


@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGPT()], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pattern_lies_along_what_an_output_reads_in_every_family(family: str, method: Any) -> None:
    model = precise(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = [m for m in matrices(model) if m.slot is None or method.reading is None]
    for turn in in_turn(model, list(tokens(6, 12).split(3))):
        read = {} if method.reading is None else turn.read(method.reading)
        with torch.no_grad():
            for matrix in (m for m in found if m.layer == turn.number):
                weight = matrix.of(model.get_parameter(matrix.parameter))
                weight.copy_(method.sparsified(weight, Pattern(2, 4), read.get(matrix.name)))
    named = dict(model.named_modules())
    for matrix in found:
        weight = model.get_parameter(matrix.parameter)
        if matrix.slot is not None:
            groups = weight[matrix.slot].unflatten(1, (-1, 4))
        elif type(named[matrix.parameter.removesuffix(".weight")]).__name__ == "Conv1D":
            groups = weight.T.unflatten(1, (-1, 4))  # [in, out]
        else:
            groups = weight.unflatten(1, (-1, 4))
        assert ((groups != 0).sum(-1) == 2).all(), matrix
    changed = {matrix.parameter for matrix in found}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in changed), name
    told = counted(model)
    assert told["all"]["zeros"] == sum(kind["zeros"] for name, kind in told.items() if name != "all")
    if len(found) == len(matrices(model)):
        assert {kind["fraction"] for kind in told.values()} == {0.5}


def test_a_tied_head_stays_as_it_was() -> None:
    model = model_of("llama", tie_word_embeddings=True)
    check_alone(model, matrices(model))
    assert not any("embed" in m.parameter or "head" in m.parameter for m in matrices(model))


def test_a_matrix_that_is_another_layers_too_is_refused() -> None:
    model = model_of("llama")
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    with pytest.raises(Refusal, match=r"layers\.0\.mlp\.up_proj\.weight is also .*layers\.2\.mlp\.up_proj") as refused:
        check_alone(model, matrices(model))
    assert "\n" not in str(refused.value)


def test_experts_of_a_layout_that_is_not_known_are_told_and_routers_are_no_matrices() -> None:
    sizes = {"num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4}
    model = model_of("jetmoe", **sizes, num_experts_per_tok=2)
    assert {matrix.name for matrix in matrices(model)} == {"self_attention.kv_proj"}
    layers = model.model.layers
    left = [name for name, parameter in layers.named_parameters() if parameter.dim() == 3]
    share = sum(layers.get_parameter(n).numel() for n in left) / sum(p.numel() for p in layers.parameters())
    told = of_no_kind(model)
    assert told is not None
    assert told.startswith("12 parameters with three dimensions (mlp.input_linear.weight, mlp.output_linear.weight, ")
    assert f"left as they are, {share:.0%} of what the layers hold" in told


@pytest.mark.parametrize("family", ["llama", "gpt2", *MIXTURES, "lfm2"])
def test_families_whose_matrices_are_known_leave_none(family: str) -> None:
    convolutions = {"layer_types": ["conv", "full_attention", "conv"], "num_key_value_heads": 2}
    assert of_no_kind(model_of(family, **(convolutions if family == "lfm2" else {}))) is None
