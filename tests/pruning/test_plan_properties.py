"""What holds of every plan, whatever the scores (ties included) and whatever is asked for."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from models.errors import Refusal
from models.load import empty_model
from models.pruning.groups import anatomy_of
from models.pruning.plan import RANKINGS, Wish, alike, choose
from models.pruning.sizes import PER, Shapes
from tests.pruning.families import config_of

LAYERS = 4
FAMILIES = {
    "llama": {"num_key_value_heads": 4},
    "gpt2": {},
    "mixtral": {"intermediate_size": 24, "num_key_value_heads": 4},
}
KINDS = {"llama": ["heads", "mlp", "layers"], "gpt2": ["heads", "mlp", "layers"]}
KINDS["mixtral"] = [*KINDS["llama"], "experts"]
families = st.sampled_from(sorted(FAMILIES))


@cache
def shapes_of(family: str) -> Shapes:
    model = empty_model(config_of(family, num_hidden_layers=LAYERS, **FAMILIES[family]))
    return Shapes.of_model(model, anatomy_of(model))


def scores_of(shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """With many ties, or hardly any."""
    random = np.random.default_rng(seed)
    levels = [1, 3, 1000][seed % 3]
    return {group.name: random.integers(0, levels, group.units) / levels for group in shapes.anatomy.groups.values()}


seeds = st.integers(0, 2**32 - 1)


@st.composite
def wishes(draw: st.DrawFn, family: str, **fixed: Any) -> Wish:
    values: dict[str, Any] = {
        "kinds": draw(st.lists(st.sampled_from(KINDS[family]), min_size=1, unique=True)),
        "kept_fraction": draw(st.floats(0.05, 1)),
        "ranking": draw(st.sampled_from(RANKINGS)),
        "per": draw(st.sampled_from(PER)),
        "protect_first": draw(st.integers(0, 1)),
        "protect_last": draw(st.integers(0, 2)),
        "multiple_of": draw(st.sampled_from([1, 2, 5])),
    }
    return Wish(**values | fixed)


def chosen(shapes: Shapes, scores: dict[str, np.ndarray], wish: Wish) -> dict[str, np.ndarray]:
    """The plan; an example of which too little could go is left aside."""
    try:
        return choose(shapes, scores, wish)
    except Refusal:
        reject()


def kept_in(shapes: Shapes, kept: dict[str, np.ndarray], name: str) -> set[int]:
    return set(kept.get(name, np.arange(shapes.anatomy.groups[name].units)).tolist())


@given(families, seeds, st.data())
def test_a_plan_keeps_units_that_exist_and_the_best_of_each_group(family: str, seed: int, data: st.DataObject) -> None:
    shapes = shapes_of(family)
    scores = scores_of(shapes, seed)
    wish = data.draw(wishes(family))
    for name, units in chosen(shapes, scores, wish).items():
        group = shapes.anatomy.groups[name]
        assert group.kind in wish.kinds
        assert 1 <= len(units) < group.units
        assert (np.diff(units) > 0).all()
        assert 0 <= units[0] <= units[-1] < group.units
        removed = np.setdiff1d(np.arange(group.units), units)
        guarded = set(range(wish.protect_first)) | set(range(LAYERS - wish.protect_last, LAYERS))
        if group.kind == "layers":
            assert guarded <= set(units.tolist())
            units = np.setdiff1d(units, sorted(guarded))
        elif group.layer is not None:
            assert group.layer not in guarded
        assert not len(units) or scores[name][units].min() >= scores[name][removed].max()


@given(families, seeds, st.data())
def test_smaller_plans_are_part_of_larger_ones_whatever_is_ranked(family: str, seed: int, data: st.DataObject) -> None:
    shapes = shapes_of(family)
    scores = scores_of(shapes, seed)
    wish = data.draw(wishes(family))
    larger = Wish(**{**wish.__dict__, "kept_fraction": data.draw(st.floats(wish.kept_fraction or 0, 1))})
    small, large = chosen(shapes, scores, wish), chosen(shapes, scores, larger)
    both = [(small, large)]
    if "layers" not in wish.kinds:  # the average is over the layers that stay
        both.append((alike(shapes, scores, small, wish), alike(shapes, scores, large, larger)))
    for part, whole in both:
        for name in shapes.anatomy.groups:
            assert kept_in(shapes, part, name) <= kept_in(shapes, whole, name), name


@given(families, seeds, st.data())
def test_a_budget_is_met_or_refused_and_never_overdrawn(family: str, seed: int, data: st.DataObject) -> None:
    shapes = shapes_of(family)
    scores = scores_of(shapes, seed)
    whole = shapes.size({}).parameters
    target = data.draw(st.integers(whole // 20, whole))
    budget = data.draw(st.sampled_from([{"target_parameters": target}, {"target_bytes": 2 * target + 1}]))
    wish = data.draw(wishes(family, kept_fraction=None, **budget))
    try:
        plans = [choose(shapes, scores, wish)]
        plans.append(alike(shapes, scores, plans[0], wish))
    except Refusal as problem:
        said, plans = str(problem), []
    else:
        said = ""
    assert plans or re.fullmatch(f"pruning: {target:,} parameters at most .*", said)
    for kept in plans:
        assert shapes.size(kept).parameters <= target


@given(families, seeds, st.data())
def test_widths_of_a_plan_are_alike_and_multiples_of_what_is_asked(family: str, seed: int, data: st.DataObject) -> None:
    shapes = shapes_of(family)
    scores = scores_of(shapes, seed)
    wish = data.draw(wishes(family, kinds=["mlp"], ranking="layer"))
    kept = alike(shapes, scores, choose(shapes, scores, wish), wish)
    widths = {len(units) for units in kept.values()}
    assert len(widths) <= 1
    assert all(width % wish.multiple_of == 0 for width in widths)


@given(st.integers(1, 7), st.floats(0.05, 1))
def test_steps_lead_from_the_whole_model_to_what_is_asked(steps: int, fraction: float) -> None:
    whole = 10_000
    target = max(1, round(fraction * whole))
    for wish, field, from_whole in (
        (Wish(kept_fraction=fraction), "kept_fraction", 1.0),
        (Wish(kept_fraction=None, target_parameters=target), "target_parameters", whole),
        (Wish(kept_fraction=None, target_bytes=2 * target), "target_bytes", 2 * whole),
    ):
        asked = [getattr(wish.after(step, steps, whole), field) for step in range(steps + 1)]
        assert asked[0] == from_whole
        assert asked[-1] == pytest.approx(getattr(wish, field))
        assert asked == sorted(asked, reverse=True)
