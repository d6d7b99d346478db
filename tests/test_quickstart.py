"""The default job at full length: marked slow."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import train


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_distilled_student_beats_its_control(tmp_path: Path, seed: int) -> None:
    done = train(f"run_dir={tmp_path}/run", f"seed={seed}", timeout=1700)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    rows = {row["stage"]: row for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}
    assert 3 * rows["distill"]["parameters"] <= rows["pretrain"]["parameters"]
    assert rows["pretrain"]["perplexity"] < rows["distill"]["perplexity"] < rows["control"]["perplexity"]
