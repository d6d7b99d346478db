"""A rank that stops is named by the others, and the job ends; in processes of their own, without PyTorch."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from callbacks.heartbeat import _place
from tests.command import ENVIRONMENT, ROOT

RANK = """
import sys, time
from pathlib import Path
from callbacks.heartbeat import Heartbeat

def waits_for_the_others(heart):
    while True:
        time.sleep(0.01)

folder, rank, world, busy = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "busy"
apart = sys.argv[4] == "apart"
words = ("record", "batch") if apart else ("distill", "micro-batch")
silent = 60 if sys.argv[4] == "silent" else 0.6
heart = Heartbeat(words[0], folder, rank, world, silent_seconds=silent, timeout_seconds=2.4, unit=words[1])
heart.start()
for _ in range(40 if apart else 0):
    heart.progress += 1
    time.sleep(0.1)
if apart:
    waits_for_the_others(heart)
for step in range(20 if busy else 4):  # as if rank 1 held the others up at step 5
    heart.progress += 1
    heart.step = step
    time.sleep(0.1)
if busy:
    time.sleep(0.5)
    heart.stop()
    sys.exit(0)
waits_for_the_others(heart)
"""


def _start(folder: Path, rank: int, world: int, kind: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", RANK, str(folder), str(rank), str(world), kind]
    return subprocess.Popen(words, cwd=ROOT, text=True, stderr=subprocess.PIPE)


def _wait_for(path: Path, seconds: float = 20) -> dict[str, int]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if path.exists():
            return json.loads(path.read_text())  # type: ignore[no-any-return]
        time.sleep(0.02)
    raise AssertionError(f"{path} did not come")


def test_a_stopped_rank_is_named_and_everybody_ends(tmp_path: Path) -> None:
    ranks = [_start(tmp_path, rank, 3, "waits") for rank in range(3)]
    pids = [_wait_for(tmp_path / f"rank-{rank:05d}.json")["pid"] for rank in range(3)]
    os.kill(pids[1], signal.SIGSTOP)
    told = [process.communicate(timeout=30)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, -signal.SIGKILL, 1]  # it would not hear a polite signal
    assert told[1:] == ["", ""]  # one of them speaks for all
    lines = told[0].splitlines()
    assert re.match(
        rf"distill: rank 1 \(.*, process {pids[1]}\) has not finished a micro-batch for \d s; it was last", lines[0]
    )
    assert re.match(
        r"error: distill: no progress for \d s \(strategy.timeout_minutes\), waiting for rank 1;", lines[-1]
    )


def test_ranks_that_wait_for_each_other_say_where_they_are(tmp_path: Path) -> None:
    """None is stopped: a collective that one of them never enters."""
    ranks = [_start(tmp_path, rank, 2, "waits") for rank in range(2)]
    told = [process.communicate(timeout=30)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert re.search(r"it is in step 4 at <string>:[78] \(waits_for_the_others\)", told[0])


def test_a_job_ends_after_its_time_where_ranks_would_be_named_later(tmp_path: Path) -> None:
    ranks = [_start(tmp_path, rank, 2, "silent") for rank in range(2)]
    _wait_for(tmp_path / "rank-00001.json")
    begin = time.monotonic()
    told = [process.communicate(timeout=90)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert 2 < time.monotonic() - begin < 20  # 2.4 s, on a busy machine
    assert re.match(r"distill: rank 0 .* has not finished a micro-batch for \d s; it is in step 4", told[0])
    assert re.search(r"\nerror: distill: no progress for \d s \(strategy.timeout_minutes\)", told[0])


def test_a_rank_that_is_gone_is_named_while_another_gets_on_and_the_job_ends_when_none_does(tmp_path: Path) -> None:
    """As where ranks work apart, and wait for each other at the end only; what they count is named as it is called."""
    ranks = [_start(tmp_path, rank, 2, "apart") for rank in range(2)]
    pids = [_wait_for(tmp_path / f"rank-{rank:05d}.json")["pid"] for rank in range(2)]
    begin = time.monotonic()
    os.kill(pids[1], signal.SIGSTOP)
    told = [process.communicate(timeout=30)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [1, -signal.SIGKILL]
    assert time.monotonic() - begin > 4 + 2.4 - 1  # the other one's work, then the time without progress
    named, *_, ended = told[0].splitlines()
    assert re.match(
        rf"record: rank 1 \(.*, process {pids[1]}\) has not finished a batch for [01] s; it was last at", named
    )
    assert re.match(r"error: record: no progress for \d s \(strategy.timeout_minutes\), waiting for rank 1;", ended)


def test_a_job_that_was_suspended_as_a_whole_goes_on(tmp_path: Path) -> None:
    ranks = [_start(tmp_path, rank, 2, "busy") for rank in range(2)]
    for rank in range(2):
        _wait_for(tmp_path / f"rank-{rank:05d}.json")
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(4)  # longer than the job may take without progress
    for process in ranks:
        process.send_signal(signal.SIGCONT)
    assert [(process.communicate(timeout=30)[1], process.returncode) for process in ranks] == [("", 0)] * 2


def test_ranks_that_get_on_are_let_be(tmp_path: Path) -> None:
    ranks = [_start(tmp_path, rank, 2, "busy") for rank in range(2)]
    assert [(process.communicate(timeout=30)[1], process.returncode) for process in ranks] == [("", 0)] * 2


def test_a_library_in_an_environment_inside_the_project_is_not_the_projects_own_place() -> None:
    library: dict[str, Any] = {}
    exec(compile("def call(work): return work()", f"{ROOT}/.venv/lib/site-packages/library.py", "exec"), library)
    assert re.match(r"tests/test_heartbeat.py:\d+ \(test_a_library", library["call"](lambda: _place(sys._getframe(1))))


LAUNCHED = """
import os, sys, time
from pathlib import Path
from callbacks.heartbeat import Heartbeat

rank = int(os.environ["RANK"])
heart = Heartbeat("distill", Path(sys.argv[1]), rank, int(os.environ["WORLD_SIZE"]), 2.0, 4.0)
heart.start()
if rank == 2:  # it gets on last, and is the first to know
    time.sleep(2)
    heart.progress += 1
time.sleep(600)
"""


def test_under_torchrun_which_ends_the_others_with_the_first_it_is_said_why_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(LAUNCHED)
    launcher = [sys.executable, "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=4"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "rank.py"), str(tmp_path / "ranks")],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: distill: no progress for \d+ s \(strategy.timeout_minutes\), waiting for rank 0", error)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_stopped_rank_ends_a_real_training(tmp_path: Path, strategy: str) -> None:
    from tests.command import SMALL, start, train

    words = [f"run_dir={tmp_path / 'run'}", *SMALL, "trainer.accelerator=cpu"]
    assert train(*words, "stages=[pretrain]").returncode == 0
    process = start(
        *words,
        "stages=[distill]",
        f"strategy={strategy}",
        "trainer.devices=2",
        "stages.distill.training.max_steps=100000",
        "strategy.timeout_minutes=0.2",  # the process group waits longer, or its traceback came first
        "callbacks.watchdog.silent_seconds=4",
        log=tmp_path / "log",
    )
    log = _stop_rank_1(process, tmp_path, "distill", after_seconds=2)
    assert re.search(r"distill: rank 1 \(.*\) has not finished a micro-batch for", log)


@pytest.mark.slow
def test_a_stopped_rank_ends_a_recording(tmp_path: Path) -> None:
    """Whose process group would wait for half a day."""
    from tests.command import SMALL, start, train

    words = [f"run_dir={tmp_path / 'run'}", *SMALL, "trainer.accelerator=cpu"]
    assert train(*words, "stages=[pretrain]").returncode == 0
    recording = [*words, "teacher=cached", "stages=[record]", "strategy=ddp", "trainer.devices=2"]
    watched = ["strategy.timeout_minutes=0.2", "callbacks.watchdog.silent_seconds=4"]
    process = start(*recording, *watched, "stages.record.batch_size=1", log=tmp_path / "log")
    log = _stop_rank_1(process, tmp_path, "record", after_seconds=0)
    assert re.search(r"record: rank 1 \(.*\) has not finished a batch for \d+ s; it was last at \w", log)
    done = train(*recording)
    assert done.returncode == 0, done.stderr


def _stop_rank_1(process: subprocess.Popen[str], folder: Path, stage: str, after_seconds: float) -> str:
    """What is said then, by a job that ends."""
    told = _wait_for(folder / "run" / "work" / stage / "ranks" / "rank-00001.json", seconds=120)
    time.sleep(after_seconds)
    os.kill(told["pid"], signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        assert process.wait(timeout=120) == 1
    finally:
        process.kill()  # what it has started goes with it
    assert time.monotonic() - stopped < 60
    log = (folder / "log").read_text()
    assert f"error: {stage}: no progress for" in log
    return log
