"""What a job goes through on a real Slurm, again and again: does it hang, what is lost, are the weights the same?

python -m tests.slurm.survive [TIMES [KIND ...]]
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.logs import starts
from tests.slurm.rehearse import status, submit
from tests.slurm.throwaway import NODES, Cluster, cluster, missing

EVERY = 5  # steps between checkpoints
_WORDS = [
    "only=[pretrain]",
    "launch.resources.prepare=null",
    "stages.pretrain.training.max_steps=30",
    f"trainer.checkpoint.every_steps={EVERY}",
    "trainer.log_every_steps=1",
    "strategy.timeout_minutes=0.4",
    "callbacks.watchdog.silent_seconds=5",
    "+callbacks.skew={_target_: tests.slurm.skew.Skew}",
]
_PATIENCE = 900.0


def _ranks(run_dir: Path) -> list[int]:
    """Processes of the ranks, which run on this machine."""
    paths = sorted((run_dir / "work" / "pretrain" / "ranks").glob("rank-*.json"))
    return [json.loads(path.read_text())["pid"] for path in paths]


def _notice(up: Cluster, run_dir: Path, job: str) -> None:
    up.command("scancel", "--batch", "--signal=USR1", job)


def _preempt(up: Cluster, run_dir: Path, job: str) -> None:
    words = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
    up.command("sbatch", *words, cwd=run_dir)


def _requeue(up: Cluster, run_dir: Path, job: str) -> None:
    up.command("scontrol", "requeue", job)


def _node_down(up: Cluster, run_dir: Path, job: str) -> None:
    up.command("scontrol", "update", f"NodeName={NODES[1]}", "State=DOWN", "Reason=test")
    time.sleep(5)  # it comes back by itself, as soon as its slurmd says that it is there


def _kill_rank(up: Cluster, run_dir: Path, job: str) -> None:
    os.kill(_ranks(run_dir)[1], signal.SIGKILL)


def _stop_rank(up: Cluster, run_dir: Path, job: str) -> None:
    os.kill(_ranks(run_dir)[1], signal.SIGSTOP)


def _kill_slurmd(up: Cluster, run_dir: Path, job: str) -> None:
    subprocess.run(["pkill", "-KILL", "-f", f"slurmd -D -N {NODES[1]}"], check=True)
    time.sleep(3)
    up.start_node(NODES[1])


KINDS: dict[str, tuple[str, Callable[[Cluster, Path, str], None], bool]] = {  # and whether a warning comes
    "notice": ("SIGUSR1, which Slurm sends before the time limit", _notice, True),
    "preempt": ("preempted, with a grace time", _preempt, True),
    "requeue": ("`scontrol requeue`", _requeue, False),
    "node": ("a node is set DOWN, and comes back", _node_down, False),
    "killed": ("a rank is killed (SIGKILL)", _kill_rank, False),
    "stopped": ("a rank is stopped (SIGSTOP)", _stop_rank, False),
    "slurmd": ("a node's slurmd is killed, and started again", _kill_slurmd, True),
}


def kept_steps(run_dir: Path) -> int:
    """The last that was logged."""
    path = run_dir / "work" / "pretrain" / "metrics.jsonl"
    lines = path.read_text().splitlines()[:-1] if path.exists() else []  # the last may be half written
    return max((json.loads(line)["step"] for line in lines), default=0)


def _weights(run_dir: Path) -> str:
    told: str = json.loads((run_dir / "pretrain" / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
    return told


def trial(up: Cluster, run_dir: Path, kind: str) -> dict[str, Any]:
    """Harm once, then the same command until it is done. How many steps were done twice, and the weights in the end."""
    began, submissions = time.monotonic(), 1
    assert submit(up, run_dir, *_WORDS).returncode == 0
    job = str(status(up, run_dir)["pretrain"]["job"])
    until(lambda: kept_steps(run_dir) >= 7, run_dir)
    KINDS[kind][1](up, run_dir, job)
    at, asked = kept_steps(run_dir), time.monotonic()
    while not (run_dir / "pretrain" / "manifest.json").exists():
        if len(starts(run_dir, "pretrain")) == 1:
            at = max(at, kept_steps(run_dir))
        if time.monotonic() - asked > 8:
            asked, row = time.monotonic(), status(up, run_dir)["pretrain"]
            if row["state"] in ("failed", "stopped"):
                submissions += 1
                assert submit(up, run_dir, *_WORDS).returncode == 0
            if time.monotonic() - began > _PATIENCE:
                return {"hung": True, "state": row}
        time.sleep(0.2)
    text = "".join(path.read_text() for path in (run_dir / "logs" / "pretrain").glob("job-*.log"))
    on = [int(step) for step in re.findall(r"goes on at step (\d+)/", text)]
    return {
        "hung": False,
        "lost": max(0, at - (on[0] if on else 0)) if len(starts(run_dir, "pretrain")) > 1 else 0,
        "starts": text.count(", start "),
        "submissions": submissions,
        "seconds": time.monotonic() - began,
        "weights": _weights(run_dir),
    }


def until(met: Callable[[], bool], run_dir: Path) -> None:
    end = time.monotonic() + _PATIENCE
    while not met():
        if time.monotonic() > end:
            raise SystemExit(f"error: {run_dir} does not get on")
        time.sleep(0.2)


def main() -> None:
    if absent := missing():
        raise SystemExit(f"error: {', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    times, kinds = int((sys.argv[1:] or ["10"])[0]), sys.argv[2:] or [*KINDS]
    with tempfile.TemporaryDirectory() as home, cluster(Path(home)) as up:
        up.env.update(RETORT_PYTHON=sys.executable, OMP_NUM_THREADS="1")
        runs = Path(home) / "runs"
        whole = runs / "whole"
        assert submit(up, whole, *_WORDS).returncode == 0
        until(lambda: (whole / "pretrain" / "manifest.json").exists(), whole)
        expected, wrong = _weights(whole), 0
        for kind in kinds:
            found = []
            for number in range(times):
                run_dir = runs / f"{kind}-{number}"
                found.append(trial(up, run_dir, kind))
                print(kind, number, found[-1], flush=True)
                shutil.rmtree(run_dir, ignore_errors=True)
            told, _, warned = KINDS[kind]
            hung = sum(each["hung"] for each in found)
            same = sum(each.get("weights") == expected for each in found)
            lost = max((each["lost"] for each in found if not each["hung"]), default=0)
            bound = 1 if warned else EVERY + 1
            wrong += hung + (len(found) - same) + (lost > bound)
            print(f"| {told} | {times} | {hung} | {lost} (at most {bound}) | {same} |", flush=True)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
