"""Notice that the job ends: processes that heed it, processes that do not, and torchrun, which stands between."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.command import ROOT

STATUSES = [(signal.SIGUSR1, 75), (signal.SIGTERM, 143)]
# Says "ready", does its part, and would end with 5.
PROCESS = """
import sys, time
from pipeline.notice import notice

def say(word):
    sys.stdout.write(word + "\\n")  # at once: two ranks have one pipe
    sys.stdout.flush()

def wait():
    for _ in range(400):
        time.sleep(0.05)
        if notice.status:
            return

notice.listen()
{part}
sys.exit(5)
"""
IDLE = "say('ready')\nwait()"
HEEDING = "notice.heed()\nsay('ready')\nwait()\nsay('saved')"
HANDING_ON = "notice.heed(lambda number: print('given', number, flush=True))\nsay('ready')\nwait()"


@contextmanager
def running(part: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROCESS.format(part=part)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_process_that_heeds_no_notice_ends_at_once(number: signal.Signals, status: int) -> None:
    with running(IDLE) as process:
        process.send_signal(number)
        assert process.wait(20) == status


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_a_process_that_heeds_it_does_what_it_has_to_before_it_ends(number: signal.Signals, status: int) -> None:
    with running(f"{HEEDING}\nsys.exit(notice.status)") as process:
        process.send_signal(number)
        assert process.communicate(timeout=20)[0] == "saved\n"
        assert process.returncode == status


def test_a_notice_that_came_too_late_for_a_step_ends_the_process_when_nobody_heeds_it_any_more() -> None:
    with running(f"{HEEDING}\nnotice.unheed()") as process:
        process.send_signal(signal.SIGUSR1)
        assert process.wait(20) == 75


def test_of_two_notices_the_one_that_asks_for_no_other_try_counts() -> None:
    """A job that was given notice and then cancelled must not be queued again."""
    with running(f"{HEEDING}\ntime.sleep(1)\nsys.exit(notice.status)") as process:
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 143


def test_a_notice_is_handed_on_to_whom_a_process_waits_for() -> None:
    with running(HANDING_ON) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.communicate(timeout=20)[0] == f"given {int(signal.SIGUSR1)}\n"
        assert process.returncode == 5


@pytest.mark.parametrize(("number", "status"), STATUSES)
def test_torchrun_hands_a_notice_on_to_its_ranks_and_ends_as_they_do(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    script = tmp_path / "pipeline.worker.py"  # by this name it knows its ranks
    script.write_text(PROCESS.format(part=f"{HEEDING}\nsys.exit(notice.status)"))
    command = [sys.executable, "-m", "pipeline.torchrun", "--standalone", "--nproc-per-node=2", str(script)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(number)
        said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == ("saved\n" * 2, status)
