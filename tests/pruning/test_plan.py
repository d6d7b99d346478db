"""Plans: golden sizes, budgets, and what is nested in what."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from transformers import AutoConfig

from models.errors import Refusal
from models.load import empty_model, parameter_count
from models.pruning.groups import anatomy_of
from models.pruning.plan import Wish, alike, choose
from models.pruning.sizes import Shapes
from models.pruning.surgery import expressible, smaller_config
from tests.pruning.families import FAMILIES, FIXED_HEADS, LAYER_NORMS, config_of

LARGE = {
    "LLaMA-7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-3.1-8B": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "TinyLlama-1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}  # fmt: skip


def shapes_of(config: Any) -> Shapes:
    model = empty_model(config)
    return Shapes.of_model(model, anatomy_of(model))


def scores_of(shapes: Shapes, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    return {group.name: draw.random(group.units) for group in shapes.anatomy.groups.values()}


@pytest.mark.parametrize(
    ("name", "protected", "before", "after"),
    [
        ("LLaMA-7B", (4, 2), 6_738_415_616, 5_422_977_024),
        ("Llama-3.1-8B", (4, 2), 8_030_261_248, 6_612_586_496),
        ("TinyLlama-1.1B", (4, 4), 1_100_048_384, 945_907_712),
    ],
)
def test_a_quarter_of_the_middle_layers_leaves_the_published_sizes(
    name: str, protected: tuple[int, int], before: int, after: int
) -> None:
    """LLM-Pruner's own plan, layers 4 to 29 of LLaMA-7B."""
    shapes = shapes_of(AutoConfig.for_model("llama", **LARGE[name], tie_word_embeddings=False))
    wish = Wish(kept_fraction=0.75, protect_first=protected[0], protect_last=protected[1])
    assert shapes.size({}).parameters == before
    assert shapes.size(choose(shapes, scores_of(shapes), wish)).parameters == after


@pytest.mark.parametrize("kind", ["heads", "mlp", "experts", "hidden", "layers"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plans_size_is_that_of_the_model_its_config_makes(family: str, kind: str) -> None:
    config = config_of(family)
    shapes = shapes_of(config)
    if not shapes.anatomy.of(kind) or (kind == "heads" and family in FIXED_HEADS):
        pytest.skip("this family has none, or cannot express it")
    if kind == "hidden" and family in LAYER_NORMS:
        pytest.skip("LayerNorm's means")
    wish = Wish(kinds=(kind,), kept_fraction=0.6, multiple_of=4 if kind == "hidden" else 1)
    kept = alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), wish), wish)
    assert kept
    smaller, _ = smaller_config(config, shapes.anatomy, kept)
    size = shapes.size(kept)
    assert size.parameters == parameter_count(empty_model(smaller))
    heads = getattr(smaller, "num_key_value_heads", None) or smaller.num_attention_heads
    width = getattr(smaller, "head_dim", None) or smaller.hidden_size // smaller.num_attention_heads
    assert size.kv_bytes == 2 * 2 * smaller.num_hidden_layers * heads * width


def test_the_products_of_a_token_are_those_of_the_seeds_arithmetic() -> None:
    shapes = shapes_of(AutoConfig.for_model("llama", **LARGE["LLaMA-7B"], tie_word_embeddings=False))
    layer = 4 * 4096 * 4096 + 3 * 4096 * 11008
    assert shapes.size({}).macs == 32 * layer + 32000 * 4096
    moe = shapes_of(config_of("mixtral"))
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert moe.size({}).macs == 3 * (attention + 4 * 32 + 2 * 3 * 20 * 32) + 61 * 32  # two experts of four


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("kinds", [("heads", "mlp"), ("layers",), ("hidden",)])
def test_smaller_plans_are_part_of_larger_ones(ranking: str, kinds: tuple[str, ...]) -> None:
    shapes = shapes_of(config_of("mistral", num_hidden_layers=6, intermediate_size=64))
    scores = scores_of(shapes)
    wishes = [Wish(kinds=kinds, kept_fraction=fraction, ranking=ranking) for fraction in (0.9, 0.8, 0.7, 0.4)]
    plans = [choose(shapes, scores, wish) for wish in wishes]
    for make in (plans, [alike(shapes, scores, plan, wish) for plan, wish in zip(plans, wishes, strict=True)]):
        for larger, smaller in pairwise(make):
            for name in shapes.anatomy.groups:
                whole = np.arange(shapes.anatomy.groups[name].units)
                assert set(smaller.get(name, whole)) <= set(larger.get(name, whole))


@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_number_of_parameters_is_hit_to_a_channel(ranking: str) -> None:
    config = AutoConfig.for_model("llama", **LARGE["TinyLlama-1.1B"], tie_word_embeddings=False)
    shapes = shapes_of(config)
    for target in (700_000_000, 900_000_000):
        wish = Wish(kept_fraction=None, target_parameters=target, ranking=ranking)
        kept = alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), wish), wish)
        channel = 22 * 3 * 2048
        assert target - channel < shapes.size(kept).parameters <= target
        in_bytes = Wish(kept_fraction=None, target_bytes=2 * target, ranking=ranking)
        same = alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), in_bytes), in_bytes)
        assert shapes.size(same) == shapes.size(kept)


def test_the_best_go_last_and_what_costs_more_must_be_worth_more() -> None:
    shapes = shapes_of(config_of("mistral", num_key_value_heads=4))
    scores = scores_of(shapes)
    kept = choose(shapes, scores, Wish(kept_fraction=0.5))
    for name, units in kept.items():
        removed = np.setdiff1d(np.arange(shapes.anatomy.groups[name].units), units)
        assert scores[name][units].min() > scores[name][removed].max()
    even = {name: np.ones_like(each) for name, each in scores.items()}
    heads, mlp = (shapes.anatomy.of(kind)[0] for kind in ("heads", "mlp"))
    assert shapes.cost(heads, "parameter") > shapes.cost(mlp, "parameter") == 3 * 32
    dear = choose(shapes, even, Wish(kept_fraction=0.5, ranking="global", per="parameter"))
    assert any(len(dear.get(group.name, range(99))) == 1 for group in shapes.anatomy.of("heads"))
    cache = choose(shapes, even, Wish(kept_fraction=0.9, ranking="global", per="kv_byte"))
    assert cache
    assert not {name for name in cache if "mlp" in name}  # a channel takes no cache


def test_widths_are_multiples_where_that_is_asked() -> None:
    shapes = shapes_of(AutoConfig.for_model("llama", **LARGE["LLaMA-7B"], tie_word_embeddings=False))
    for of in (8, 64, 128):
        for wish in (
            Wish(kept_fraction=0.77, multiple_of=of),
            Wish(kept_fraction=None, target_parameters=5_000_000_000, multiple_of=of),
            Wish(kept_fraction=0.77, multiple_of=of, ranking="global"),
        ):
            kept = alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), wish), wish)
            widths = {len(units) for name, units in kept.items() if "mlp" in name}
            assert all(width % of == 0 for width in widths)
            assert wish.ranking == "global" or len(widths) == 1


def test_experts_stay_as_wide_as_grouped_products_take_them() -> None:
    shapes = shapes_of(config_of("qwen3_moe"))
    wish = Wish(kinds=("mlp",), kept_fraction=0.6)
    kept = alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), wish), wish)
    assert {len(units) for units in kept.values()} == {16}  # of 24, where 14.4 are asked for


def test_protected_layers_stay_when_layers_go() -> None:
    shapes = shapes_of(config_of("llama", num_hidden_layers=8))
    scores = {**scores_of(shapes), "layers": np.arange(8)[::-1].astype(float)}
    wish = Wish(kinds=("layers",), kept_fraction=0.5, protect_first=1, protect_last=2)
    assert choose(shapes, scores, wish)["layers"].tolist() == [0, 1, 6, 7]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"kinds": ("neurons",)}, "neurons is none of heads, mlp"),
        ({"kinds": ()}, "nothing may be removed"),
        ({"kinds": ("experts",)}, "this model has no experts"),
        ({"kept_fraction": 0.0}, r"kept_fraction=0\.0: need \(0, 1\]"),
        ({"kept_fraction": 1.5}, r"need \(0, 1\]"),
        ({"target_parameters": 5}, "need one, the others null"),
        ({"kept_fraction": None}, "no budget given"),
        ({"kept_fraction": None, "target_parameters": 10}, "10 parameters at most are asked for, and the fewest"),
        ({"ranking": "best"}, "need one of layer, global"),
        ({"per": "watt"}, "need one of unit"),
        ({"protect_first": 2, "protect_last": 1}, "leave none of 3 layers"),
        ({"protect_first": -1}, "need 0 or more"),
        ({"multiple_of": 0}, "need 1 or more"),
        ({"multiple_of": 1.5}, r"multiple_of=1\.5: need a whole number"),
        ({"kept_fraction": "abc"}, "kept_fraction=abc: need a number"),
        ({"kept_fraction": None, "target_bytes": -4}, "need a number above 0"),
        ({"kept_fraction": None, "target_parameters": 10**9}, "the model has .* only"),
    ],
)
def test_what_cannot_be_wished_for_is_refused_in_one_line(values: dict[str, Any], said: str) -> None:
    shapes = shapes_of(config_of("llama"))
    with pytest.raises(Refusal, match=said) as refused:
        choose(shapes, scores_of(shapes), Wish(**values))
    assert "\n" not in str(refused.value)


def test_scores_that_are_no_numbers_are_refused() -> None:
    shapes = shapes_of(config_of("llama"))
    scores = scores_of(shapes)
    scores["layers.1.mlp"][3] = math.nan
    with pytest.raises(Refusal, match=r"layers\.1\.mlp: its scores hold values that are no numbers"):
        choose(shapes, scores, Wish())


@pytest.mark.parametrize(("family", "heads"), [("gpt2", 4), ("gemma2", 2), ("llama", 3), ("mistral", 3)])
def test_heads_are_as_many_as_the_config_can_express(family: str, heads: int) -> None:
    """Gemma 2's must divide its width; GPT-2 has no width of a head; Llama's plan can be Mistral's."""
    config = config_of(family, **({} if family == "gpt2" else {"num_key_value_heads": 4}))
    shapes = shapes_of(config)
    wish = Wish(kept_fraction=0.7)
    wanted = choose(shapes, scores_of(shapes), wish)
    kept = alike(shapes, scores_of(shapes), wanted, wish, lambda some: expressible(config, shapes.anatomy, some))
    assert len(kept.get("layers.1.heads", range(4))) == heads
    assert len(kept["layers.1.mlp"]) == 14
    smaller, _ = smaller_config(config, shapes.anatomy, kept)
    assert shapes.size(kept).parameters == parameter_count(empty_model(smaller))


@pytest.mark.parametrize("ranking", ["layer", "global"])
@pytest.mark.parametrize("kinds", ["heads", "heads mlp", "mlp", "layers mlp", "experts mlp", "experts"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gemma2"])
def test_a_budget_is_never_overdrawn_and_used_well(family: str, kinds: str, ranking: str) -> None:
    width = {"n_inner": 64} if family == "gpt2" else {"intermediate_size": 64}
    config = config_of(family, num_hidden_layers=6, **width)
    shapes = shapes_of(config)
    if not all(shapes.anatomy.of(kind) for kind in kinds.split()) or (kinds == "heads" and family == "gpt2"):
        pytest.skip("this family has none, or cannot express it")
    whole = shapes.size({}).parameters
    groups = [group for group in shapes.anatomy.groups.values() if group.kind in kinds.split()]
    least = shapes.size({group.name: np.arange(1) for group in groups}).parameters
    met = 0
    for seed, share in enumerate((0.9, 0.7, 0.5)):
        target = round(least + share * (whole - least))
        wish = Wish(kinds=kinds.split(), kept_fraction=None, target_parameters=target, ranking=ranking)
        scores = scores_of(shapes, seed)
        try:
            wanted = choose(shapes, scores, wish)
            kept = alike(shapes, scores, wanted, wish, lambda some: expressible(config, shapes.anatomy, some))
        except Refusal:  # a head or an expert less in six layers at once can be more than there is room for
            assert kinds in ("heads", "experts")
            continue
        size = shapes.size(kept).parameters
        met += 1
        assert size <= target
        smaller, _ = smaller_config(config, shapes.anatomy, kept)
        assert size == parameter_count(empty_model(smaller))
        assert len(kept.get("layers", [0])) >= 1
        if kinds == "heads mlp" and family == "llama":  # one channel in every layer is the least there is
            assert target - size < 6 * 3 * 32
    assert met >= 2


def test_the_stream_is_as_wide_as_the_config_can_express() -> None:
    """Gemma 2's width has to be a multiple of its heads."""
    config = config_of("gemma2")
    shapes = shapes_of(config)
    wish = Wish(kinds=("hidden",), kept_fraction=0.8)
    wanted = choose(shapes, scores_of(shapes), wish)
    assert len(wanted["hidden"]) == 26
    kept = alike(shapes, scores_of(shapes), wanted, wish, lambda some: expressible(config, shapes.anatomy, some))
    assert len(kept["hidden"]) in (24, 28)


def test_widths_that_differ_between_layers_are_not_pruned_together() -> None:
    config = config_of("qwen3_moe", mlp_only_layers=[1])
    shapes = shapes_of(config)
    wish = Wish(kept_fraction=0.75)
    with pytest.raises(Refusal, match="mlp are of 20 and 24 units in different layers"):
        alike(shapes, scores_of(shapes), choose(shapes, scores_of(shapes), wish), wish)
