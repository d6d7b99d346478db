from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from models.errors import Refusal
from pipeline.data.calibration import Calibration, beginning


def sequences(*lengths: int) -> list[dict[str, Any]]:
    """Of tokens that are numbered through."""
    ids = iter(range(sum(lengths)))
    found = []
    for length in lengths:
        mine = [next(ids) for _ in range(length)]
        found.append({"input_ids": mine, "position_ids": list(range(length)), "targets": [*mine[1:], -100]})
    return found


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_sample_begins_where_something_is_to_be_predicted() -> None:
    """Of a conversation with a long prompt the first tokens teach nothing."""
    row = {"input_ids": list(range(40)), "position_ids": list(range(40)), "targets": [-100] * 30 + list(range(10))}
    assert beginning(row, 8)["input_ids"] == list(range(26, 34))  # type: ignore[index]
    assert beginning(row, 30)["input_ids"] == list(range(10, 40))  # type: ignore[index]
    assert beginning({**row, "targets": list(range(40))}, 8)["input_ids"] == list(range(8))  # type: ignore[index]
    assert beginning({**row, "targets": [-100] * 40}, 8) is None


def test_concatenated_samples_are_whole_documents_in_the_order_drawn_split_at_the_length() -> None:
    text = sequences(5, 9, 2, 30, 7)
    joined = [token for number in draw().permutation(5) for token in text[int(number)]["input_ids"]]
    taken = Calibration(samples=4, length=10, batch_size=8, concatenated=True).take("quantize", text, draw())
    assert [sample["input_ids"] for sample in taken] == [joined[at : at + 10] for at in range(0, 40, 10)]
    ends = {sequence["input_ids"][-1] for sequence in text}
    for sample in taken:
        assert sample["position_ids"] == list(range(10))
        assert [target == -100 for target in sample["targets"]] == [token in ends for token in sample["input_ids"]]


def test_other_samples_are_the_beginnings_of_sequences_and_there_can_be_fewer() -> None:
    text = sequences(5, 9, 2, 30, 7)
    taken = Calibration(samples=9, length=6, batch_size=8, concatenated=False).take("prune", text, draw())
    assert [sample["input_ids"] for sample in taken] == [text[n]["input_ids"][:6] for n in draw().permutation(5)]
    assert len(Calibration(3, 6, 8, False).take("prune", text, draw())) == 3


def test_too_little_text_to_concatenate_is_refused() -> None:
    with pytest.raises(Refusal, match=r"samples=3 of calibration\.length=10: need 30 tokens, and data.train has 14"):
        Calibration(samples=3, length=10, batch_size=8, concatenated=True).take("quantize", sequences(5, 9), draw())


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("length", 1), ("batch_size", 0)])
def test_sizes_that_cannot_be_are_refused(name: str, value: int) -> None:
    sizes: dict[str, Any] = {"samples": 1, "length": 2, "batch_size": 1, name: value}
    with pytest.raises(Refusal, match=rf"calibration\.{name}={value}: need at least"):
        Calibration(**sizes, concatenated=True)
