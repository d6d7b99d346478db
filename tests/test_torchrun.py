"""Several ranks of which some fail: one says why, and the command ends as that one did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from pipeline import logs
from tests.command import ENVIRONMENT, ROOT, train


def ranks(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=2", *words],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), **environment},
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


@pytest.mark.slow
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
    done = ranks("-m", "pipeline.worker", "run", str(spec), RETORT_LOGS=str(tmp_path))
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "no_such" in error
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank-*.error.json"))]
    assert told  # of whoever was not ended with the first one before it could say why
    assert all(f"error: {each['message']}" == error and each["rank"] in (0, 1) for each in told)
    assert sum(error in path.read_text() for path in tmp_path.glob("rank-*.log")) == 1


def test_of_several_reasons_that_of_the_rank_that_failed_first_is_the_stages(tmp_path: Path) -> None:
    ended = tmp_path / "ended.json"
    for rank, at in ((0, 30.0), (1, 10.0)):
        logs.tell({"rank": rank, "message": f"by {rank}", "time": at}, f"rank-{rank:05d}.error.json", str(tmp_path))
    logs.collect(tmp_path, "distill", 1, ended)
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "by 1"
    ended.write_text(json.dumps({"rank": 7, "message": "waited for", "time": 5.0}))  # the watchdog was earlier
    logs.collect(tmp_path, "distill", 1, ended)
    assert json.loads((tmp_path / "error.json").read_text())["rank"] == 7


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (-9, "killed (signal 9), as a system does that is out of memory; dmesg says so"),
        (130, "interrupted; the same command goes on"),
        (-6, "ended with signal 6, unsaid why"),
        (7, "ended with exit status 7, unsaid why"),
    ],
)
def test_where_no_rank_said_why_the_command_says_how_it_ended(tmp_path: Path, status: int, message: str) -> None:
    logs.collect(tmp_path, "distill", status, tmp_path / "ended.json")
    told = json.loads((tmp_path / "error.json").read_text())
    assert (told["stage"], told["message"]) == ("distill", message)


def test_what_a_rank_says_is_kept_up_to_the_moment_at_which_it_is_killed(tmp_path: Path) -> None:
    program = (
        "from pipeline import logs\nlogs.keep(3)\nprint('said'); import os, sys; print('aside', file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program + "os.kill(os.getpid(), 11)"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "RETORT_LOGS": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    kept = (tmp_path / "rank-00003.log").read_text()
    assert kept.startswith("said\naside\n")
    assert "Segmentation fault" in kept  # Python's own account of a crash below it
    assert "aside" in done.stderr
