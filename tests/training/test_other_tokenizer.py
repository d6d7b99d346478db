"""A student with a tokenizer of its own, from the command line to its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.command import SMALL, train

PRETRAIN = [word for word in SMALL if not word.startswith(("student.", "stages.distill", "stages.evaluate"))]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A teacher, and a student that reads other tokens."""
    folder = tmp_path_factory.mktemp("models")
    for name, vocabulary in (("teacher", 400), ("student", 300)):
        words = [f"stages.pretrain.tokenizer.vocab_size={vocabulary}", "stages=[pretrain]", "seed=1"]
        done = train(f"run_dir={folder / name}", *PRETRAIN, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    return {name: folder / name / "pretrain" for name in ("teacher", "student")}


def distil(models: dict[str, Path], student: str, run_dir: Path, *words: str) -> Any:
    return train(
        "+experiment=distill",
        f"run_dir={run_dir}",
        f"teacher.path={models['teacher']}",
        "student=folder",
        f"student.path={models[student]}",
        "data.train=stdlib",
        "data.max_documents=60",
        "data.max_length=64",
        "stages.distill.training.epochs=null",
        "stages.distill.training.max_steps=6",
        "trainer.log_every_steps=1",
        "stages=[distill]",
        *words,
    )


def losses(run_dir: Path) -> list[tuple[float, ...]]:
    lines = (json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines())
    return [(line["cross_entropy"], line["forward_kl"], line["grad_norm"]) for line in lines if "forward_kl" in line]


def test_a_student_of_other_tokens_learns_span_by_span(models: dict[str, Path], tmp_path: Path) -> None:
    done = distil(models, "student", tmp_path, "stages.distill.align=true")
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((tmp_path / "distill" / "manifest.json").read_text())
    prepared = manifest["metrics"]["data"]["train"]
    assert prepared["spanned"] > 0.97 * prepared["supervised"]
    assert prepared["teacher_tokens"] < prepared["tokens"]  # a larger vocabulary, fewer tokens
    assert all(divergence > 0 for _, divergence, _ in losses(tmp_path))
    assert len(losses(tmp_path)) == 6


@pytest.mark.slow
def test_with_identical_tokenizers_spans_change_nothing(models: dict[str, Path], tmp_path: Path) -> None:
    for name, align in (("shared", "false"), ("aligned", "true")):
        done = distil(models, "teacher", tmp_path / name, f"stages.distill.align={align}", "objective.alpha=0.9")
        assert done.returncode == 0, done.stdout + done.stderr
    one, other = losses(tmp_path / "shared"), losses(tmp_path / "aligned")
    for mine, theirs in zip(one, other, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    assert one[-1][1] > 0  # the student has moved away from its teacher, which it began as


def test_without_being_asked_to_align_other_tokens_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    done = distil(models, "student", tmp_path)
    assert done.returncode == 2
    assert "different tokenizers" in done.stderr
    assert "stages.distill.align=true" in done.stderr


def test_ranks_compare_any_two_vocabularies(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["stages.distill.align=true", "divergence=universal_logit"]
    done = distil(models, "student", tmp_path, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "distill" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["universal_logit"] <= 2 for line in lines if "universal_logit" in line)
