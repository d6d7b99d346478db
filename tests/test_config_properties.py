"""What holds of every configuration: nothing is lost, nothing is confused, nothing depends on where it lies."""

from __future__ import annotations

import copy
import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from models.errors import Refusal
from pipeline.config import Config, differences, fingerprint, identity, nearest, parse, selected
from pipeline.run import _rooted

WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=12)
LEAVES = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20)
TREES = st.dictionaries(
    WORDS,
    st.recursive(
        LEAVES, lambda node: st.lists(node, max_size=3) | st.dictionaries(WORDS, node, max_size=3), max_leaves=5
    ),
    max_size=3,
)
PATHS = st.lists(WORDS, min_size=1, max_size=3).map("/".join)


def composed(**values: Any) -> dict[str, Any]:
    """The least that fits the schema, as Hydra would hand it over."""
    stages = {"a": {"_target_": "x"}, "b": {"_target_": "y"}}
    return {"name": "n", "run_dir": "r", "order": ["a", "b"], "stages": stages, **values}


def nothing(target: str) -> tuple[str, ...]:
    """No field is immaterial."""
    return ()


# Differences and fingerprints


def applied(tree: Any, changes: list[tuple[str, Any, Any]]) -> Any:
    """`tree` with every change made; a change to None takes the key away."""
    tree = copy.deepcopy(tree)
    for key, _, new in changes:
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent]
        if new is None:
            del node[last]
        else:
            node[last] = new
    return tree


@given(TREES, TREES)
def test_differences_lead_from_one_to_the_other_and_there_are_none_to_itself(old: Any, new: Any) -> None:
    assert differences(old, copy.deepcopy(old)) == []
    assert applied(old, differences(old, new)) == new
    assert [(key, b, a) for key, a, b in differences(old, new)] == differences(new, old)


def shuffled(node: Any, order: random.Random) -> Any:
    if not isinstance(node, dict):
        return node
    keys = list(node)
    order.shuffle(keys)
    return {key: shuffled(node[key], order) for key in keys}


@given(TREES, TREES, st.randoms(use_true_random=False))
def test_a_fingerprint_is_of_what_is_written_not_of_its_order(one: Any, other: Any, order: random.Random) -> None:
    assert fingerprint(shuffled(one, order)) == fingerprint(one) == fingerprint(json.loads(json.dumps(one)))
    assert (fingerprint(one) == fingerprint(other)) == (differences(one, other) == []) or one == other


# The run folder


def with_paths(node: Any, root: str) -> Any:
    """`node` with every list's strings written as paths into `root`."""
    if isinstance(node, dict):
        return {key: with_paths(value, root) for key, value in node.items()}
    if isinstance(node, list):
        return [f"{root}/{value}" if isinstance(value, str) else value for value in node]
    return node


@given(TREES, PATHS, PATHS)
def test_a_run_folder_can_be_moved(tree: Any, here: str, there: str) -> None:
    assume(not json.dumps(tree).count(here) and not json.dumps(tree).count(there))
    one = composed(run_dir=here, stages={"a": {"parent": here, "node": with_paths(tree, here)}})
    other = composed(run_dir=there, stages={"a": {"parent": there, "node": with_paths(tree, there)}})
    assert identity(one, "a", nothing) == identity(other, "a", nothing)
    moved = _rooted(one, Path("/somewhere") / there)
    assert moved == _rooted(other, Path("/somewhere") / there) == _rooted(moved, Path("/somewhere") / there)
    assert identity(moved, "a", nothing) == identity(one, "a", nothing)


@given(PATHS, WORDS)
def test_a_folder_beside_the_run_folder_stays_where_it_is(here: str, more: str) -> None:
    beside = {"a": {"neighbour": here + more, "above": f"../{here}", "inside": f"{here}/{more}"}}
    moved = _rooted(composed(run_dir=here, stages=beside), Path("/somewhere"))["stages"]["a"]
    assert moved == {"neighbour": here + more, "above": f"../{here}", "inside": f"/somewhere/{more}"}


# Messages


@given(WORDS, st.lists(WORDS, min_size=1, max_size=9, unique=True))
def test_the_nearest_word_is_one_of_those_known(word: str, known: list[str]) -> None:
    said = nearest(word, known)
    assert said == f"; known: {', '.join(sorted(known))}" or said in {f"; did you mean {one}?" for one in known}
    assert nearest(known[0], known) == f"; did you mean {known[0]}?"


@given(st.text("abcdefghijklmnopqrstuvwxyz_", min_size=4, max_size=12), st.integers(0, 11))
def test_a_letter_that_is_missing_is_found(word: str, at: int) -> None:
    typed = word[: at % len(word)] + word[at % len(word) + 1 :]
    assert nearest(typed, [word]) == f"; did you mean {word}?"


# Parsing


@given(st.integers(-(2**62), 2**62), st.text(min_size=1, max_size=30).filter(lambda text: "$" not in text))
def test_values_come_out_of_parsing_as_they_went_in(seed: int, folder: str) -> None:
    config = parse(OmegaConf.create(composed(seed=seed, run_dir=folder)))
    assert (config["seed"], config["run_dir"]) == (seed, folder)
    assert parse(OmegaConf.create(config)) == config


@given(WORDS, LEAVES)
def test_an_unknown_key_is_refused_in_one_line_that_names_it(key: str, value: Any) -> None:
    assume(key not in Config.__dataclass_fields__ and "$" not in str(value) and value != "???")
    for config in (composed(**{key: value}), composed(trainer={key + "_": value})):
        with pytest.raises(Refusal, match=key) as refused:
            parse(OmegaConf.create(config))
        assert "\n" not in str(refused.value)


@given(st.data())
def test_a_selection_is_a_part_of_the_order_within_its_bounds(data: st.DataObject) -> None:
    order = data.draw(st.lists(WORDS, min_size=1, max_size=6, unique=True))
    some = st.none() | st.sampled_from(order)
    start, stop = data.draw(some), data.draw(some)
    only = data.draw(st.none() | st.lists(st.sampled_from(order), unique=True))
    wanted = [
        name
        for at, name in enumerate(order)
        if (start is None or at >= order.index(start))
        and (stop is None or at <= order.index(stop))
        and (only is None or name in only)
    ]
    config = {"order": order, "start": start, "stop": stop, "only": only}
    if wanted:
        assert selected(config) == wanted
    else:
        with pytest.raises(Refusal):
            selected(config)


@given(st.integers(1, 99_999), st.integers(0, 3), st.sampled_from("KMBT"))
def test_a_number_with_a_suffix_is_that_many(digits: int, places: int, suffix: str) -> None:
    text = str(Decimal(digits).scaleb(-places))
    config = composed()
    config["stages"]["a"]["max_tokens"] = text + suffix
    wanted = Decimal(text) * 10 ** {"K": 3, "M": 6, "B": 9, "T": 12}[suffix]
    found = parse(OmegaConf.create(config))["stages"]["a"]["max_tokens"]
    assert found == wanted
    assert isinstance(found, int)
