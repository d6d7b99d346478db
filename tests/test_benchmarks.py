"""Every benchmark keeps the convention of benchmarks/README.md, on settings too small to mean anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PEER_PYTHON = Path(os.environ.get("RETORT_PEER_PYTHON", ROOT / ".venv-peers/bin/python"))
TINY = [
    "--vocabulary=96",
    "--student-hidden=16",
    "--teacher-hidden=32",
    "--student-layers=1",
    "--teacher-layers=1",
    "--rows=2",
    "--length=8",
    "--steps=2",
    "--warmup-steps=1",
    "--repeats=1",
    "--threads=1",
    "--device=cpu",
]


def distillation_step(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks/distillation_step.py", *words], capture_output=True, text=True, timeout=300
    )


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_last_line_is_one_json_object_with_the_figures() -> None:
    found = figures(distillation_step("--quick", "--sides=ours", *TINY))
    assert set(found) == {"ours", "device", "settings"}
    assert found["ours"]["tokens_per_second"] > 0
    assert found["ours"]["peak_memory"] > 0
    assert found["settings"]["vocabulary"] == 96


@pytest.mark.skipif(not PEER_PYTHON.is_file(), reason="no environment with TRL; see benchmarks/README.md")
def test_both_sides_work_out_the_same_divergence() -> None:
    found = figures(distillation_step("--sides=ours,trl", *TINY))
    assert found["ours"]["first_divergence"] == pytest.approx(found["trl"]["first_divergence"], rel=1e-4)
    assert set(found["ratio"]) == {"tokens_per_second", "peak_memory"}


def test_without_the_peers_environment_the_remedy_is_named_in_one_line() -> None:
    done = distillation_step("--peer-python=/nowhere/python", *TINY)
    assert done.returncode == 2
    assert "--peer-python /nowhere/python: not there" in done.stderr.splitlines()[-1]
