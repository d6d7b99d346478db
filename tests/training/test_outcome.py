"""A training that went nowhere is told as one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.training.outcome import doubt


def _doubt(folder: Path, **columns: list[float]) -> str | None:
    lines = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return doubt(folder / "metrics.jsonl", vocabulary=500)  # ln 500 is 6.21


@pytest.mark.parametrize(
    ("losses", "told"),
    [
        ([6.2, 5.0, 4.0, 3.5, 3.4, 3.3], None),
        ([2.0, 2.1, 1.9, 2.2, 2.0, 2.3], None),  # a model that was good already
        ([6.2, 9.0, 40.0, 80.0, 95.0, 95.0], "the loss rose from 6.2 to 95"),
        ([6.2, 95.0], None),  # two steps say nothing
    ],
)
def test_a_loss_that_ends_far_above_its_start_is_told(tmp_path: Path, losses: list[float], told: str | None) -> None:
    found = _doubt(tmp_path, loss=losses)
    assert (found is None) if told is None else (found is not None and told in found)


def test_a_cross_entropy_above_that_of_guessing_is_told_although_the_loss_fell(tmp_path: Path) -> None:
    found = _doubt(tmp_path, loss=[9.0, 8.0, 7.0, 7.0, 7.0], cross_entropy=[9.0, 8.5, 8.0, 7.8, 7.5])
    assert found is not None
    assert "ended at 7.5 nats, and guessing among 500 tokens gives 6.21" in found
    assert _doubt(tmp_path, loss=[6.3, 6.25], cross_entropy=[6.3, 6.25]) is None  # fresh weights, two steps


def test_no_metrics_raise_no_doubt(tmp_path: Path) -> None:
    assert doubt(tmp_path / "metrics.jsonl", 500) is None
