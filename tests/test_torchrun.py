"""Several ranks of which some fail: one says why, and the command ends as that one did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

from tests.command import ENVIRONMENT, ROOT, train


def ranks(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=2", *words],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def script(folder: Path, rank_1: str) -> str:
    path = folder / "rank.py"
    path.write_text(f"import os, signal, sys, time\nif os.environ['RANK'] == '1':\n    {rank_1}\ntime.sleep(100)\n")
    return str(path)


def test_it_ends_with_the_status_of_the_rank_that_failed_and_says_nothing_itself(tmp_path: Path) -> None:
    done = ranks(script(tmp_path, "sys.exit(3)"))
    assert (done.returncode, done.stdout, done.stderr) == (3, "", "")


def test_a_rank_that_a_signal_ended_is_named(tmp_path: Path) -> None:
    done = ranks(script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert (done.returncode, done.stderr) == (1, "error: rank 1 was ended by SIGKILL\n")


def test_ranks_of_another_launcher_around_the_command_are_not_its_own() -> None:
    """As accelerate and Kubernetes jobs export them."""
    done = train("stages.pretrain.training.max_steps=0", WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2
    assert done.stderr == "error: stages.pretrain.training.max_steps=0: need a number above 0\n"


def test_what_all_ranks_refuse_is_told_once(tmp_path: Path) -> None:
    config = {
        "run_dir": str(tmp_path),
        "order": ["distill"],
        "stages": {"distill": {"_target_": "pipeline.no_such.Stage"}},
    }
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"config": config, "stage": "distill", "attempt": uuid4().hex, "restart": 0}))
    done = ranks("-m", "pipeline.worker", "run", str(spec))
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no_such" in error
