"""Bring your own: a real pretrained teacher and real text, from folders."""

from __future__ import annotations

import json

import pytest

from tests.command import train
from tests.optional_data import STORIES, STORIES_TEXT, needed

QUICK = [
    "stages.distill.training.max_steps=8",
    "data.max_documents=60",
    "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 16, new_tokens: 8, repeats: 1}",
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    run_dir = tmp_path_factory.mktemp("own") / "run"
    done = train(
        "+experiment=distill",
        f"teacher.path={needed(STORIES)}",
        f"data.train={needed(STORIES_TEXT)}",
        "student.shape={hidden_size: 32, intermediate_size: 96, num_hidden_layers: 2}",
        f"run_dir={run_dir}",
        *QUICK,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["stage"]: row for row in json.loads((run_dir / "report.json").read_text())["rows"]}


def test_a_teacher_folder_is_measured_as_it_is(rows: dict[str, dict[str, float]]) -> None:
    assert rows["teacher"]["parameters"] == 260_032
    # 4.53 on held-out stories elsewhere; these are other stories, in windows of 256 tokens
    assert 4.0 < rows["teacher"]["perplexity"] < 6.0
    assert rows["teacher"]["seconds"] is None


def test_student_and_control_are_trained_beside_it(rows: dict[str, dict[str, float]]) -> None:
    assert set(rows) == {"teacher", "distill", "control"}
    assert rows["distill"]["parameters"] == rows["control"]["parameters"] < 260_032
    assert rows["teacher"]["perplexity"] < rows["distill"]["perplexity"] < 512
