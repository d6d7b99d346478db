"""The flagship's chain in small, on a throw-away Slurm of this machine: submitted, preempted once, finished.

python -m tests.slurm.rehearse [RUN_DIR [WORDS of train.py]]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.slurm.throwaway import Cluster, cluster, missing

ROOT = Path(__file__).resolve().parents[2]
SMALL = [  # jobs of the flagship as these nodes can run them: one rank on each
    *("+experiment=distill_7b_to_1b", "+scale=tiny", "launch=slurm", "logger=csv"),
    *("trainer.nodes=2", "trainer.devices=1", "trainer.checkpoint.every_steps=5"),
    *("launch.resources.parallel.cpus_per_rank=1", "launch.resources.parallel.memory=8G"),
    *("launch.resources.single.cpus_per_rank=1", "launch.resources.single.memory=8G"),
    *("launch.resources.prepare.cpus_per_rank=1", "launch.resources.prepare.memory=8G"),
]
_LONG = [f"stages.{name}.training.max_steps=60" for name in ("pretrain", "distill")]  # that it is found at work


def submit(up: Cluster, run_dir: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`python train.py` on what stands for a login node."""
    flags = [word for word in words if word.startswith("-")]
    command = [sys.executable, "train.py", *flags, *SMALL, f"run_dir={run_dir}", *(w for w in words if w not in flags)]
    return subprocess.run(command, cwd=ROOT, env=up.env, capture_output=True, text=True)


def status(up: Cluster, run_dir: Path) -> dict[str, dict[str, Any]]:
    """Of each stage, as `status --json` says."""
    done = subprocess.run(
        [sys.executable, "train.py", "status", f"run_dir={run_dir}", "--json"],
        cwd=ROOT,
        env=up.env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return {row["stage"]: row for row in json.loads(done.stdout)["stages"]}


def until(up: Cluster, run_dir: Path, met: Callable[[dict[str, dict[str, Any]]], bool], seconds: float) -> None:
    """Wait until `met` says so of the status of the stages. Ends where one has failed, or time is over."""
    end = time.monotonic() + seconds
    while not met(rows := status(up, run_dir)):
        failed = [stage for stage, row in rows.items() if row["state"] == "failed"]
        if failed or time.monotonic() > end:
            why = f"{failed[0]} has failed" if failed else f"this takes longer than {seconds:.0f} s"
            raise SystemExit(f"error: {why}\n{table(up, run_dir)}")
        time.sleep(1)


def table(up: Cluster, run_dir: Path) -> str:
    command = [sys.executable, "train.py", "status", f"run_dir={run_dir}"]
    return subprocess.run(command, cwd=ROOT, env=up.env, text=True, capture_output=True).stdout


def trains(row: dict[str, Any]) -> bool:
    return (row["state"], row["part"]) == ("running", "run") and (row["step"] or 0) > 0


def rehearse(up: Cluster, run_dir: Path, *words: str) -> None:
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:5.0f} s  {text}", flush=True)

    done = submit(up, run_dir, *_LONG, *words)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode:
        raise SystemExit(done.returncode)
    stage = "distill" if "distill" in status(up, run_dir) else "pretrain"
    say(f"submitted; waiting until {stage} trains")
    until(up, run_dir, lambda rows: trains(rows[stage]), 1800)
    job = str(status(up, run_dir)[stage]["job"])
    say(f"{stage} trains in job {job}; an urgent job takes its nodes")
    command = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    urgent = up.command(*command, "--wrap=sleep 1", cwd=run_dir).strip()
    until(up, run_dir, lambda _: up.job(urgent)["JobState"] == "COMPLETED", 300)
    if up.job(job)["Restarts"] != "1":
        raise SystemExit(f"error: job {job} was not preempted and queued again: {up.job(job)}")
    say(f"job {job} was preempted, has saved its checkpoint, and is queued again")
    until(up, run_dir, lambda rows: all(row["state"] == "finished" for row in rows.values()), 1800)
    print(table(up, run_dir))
    say(f"finished; the report is {run_dir / 'report.html'}")


def main() -> None:
    if absent := missing():
        raise SystemExit(f"error: {', '.join(absent)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    run_dir, *words = sys.argv[1:] or ["runs/rehearsal"]
    with tempfile.TemporaryDirectory() as home, cluster(Path(home)) as up:
        up.env.update(RETORT_PYTHON=sys.executable, OMP_NUM_THREADS="1")
        rehearse(up, Path(run_dir).absolute(), *words)


if __name__ == "__main__":
    main()
