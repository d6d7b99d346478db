"""launch=slurm on a login node of a real Slurm: what is submitted, and what becomes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.slurm.rehearse import rehearse, status, submit
from tests.slurm.survive import kept_steps, until
from tests.slurm.throwaway import NODES, Cluster, log
from tests.stages.test_record import same_signals

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
PRETRAIN = ["only=[pretrain]", "launch.resources.prepare=null"]


def finished(run_dir: Path) -> bool:
    return (run_dir / "pretrain" / "manifest.json").exists()


def test_a_chain_is_submitted_preempted_and_finished(cluster: Cluster, tmp_path: Path) -> None:
    rehearse(cluster, tmp_path / "run", "only=[pretrain,distill]")
    assert (tmp_path / "run" / "report.html").exists()


def test_a_stage_that_fails_ends_those_that_wait_and_status_says_why(cluster: Cluster, tmp_path: Path) -> None:
    high = ["optimizer.lr=1e30", "schedule.warmup_steps=0"]
    assert submit(cluster, tmp_path, "only=[pretrain,distill]", *high).returncode == 0
    until(lambda: status(cluster, tmp_path)["distill"]["state"] == "cancelled", tmp_path)
    rows = status(cluster, tmp_path)
    assert rows["pretrain"]["state"] == "failed"
    assert "lower the learning rate" in rows["pretrain"]["error"]["message"]
    assert (rows["pretrain"]["error"]["stage"], rows["pretrain"]["error"]["status"]) == ("pretrain", 3)
    assert "lower the learning rate" in Path(rows["pretrain"]["log"]).read_text()
    assert not (tmp_path / "work" / "distill").exists()


def test_a_sweep_is_an_array_of_runs_with_folders_of_their_own(cluster: Cluster, tmp_path: Path) -> None:
    done = submit(cluster, Path(f"{tmp_path}/${{seed}}"), *PRETRAIN, "-m", "seed=0,1")
    assert done.returncode == 0, done.stderr
    until(lambda: all(finished(tmp_path / name) for name in "01"), tmp_path)
    seeds = [json.loads((tmp_path / name / "pretrain" / "manifest.json").read_text())["seed"] for name in "01"]
    assert seeds == [0, 1]
    (job,) = (tmp_path / "1" / "logs" / "pretrain").glob("job-*_1.log")
    assert "pretrain: done" in job.read_text()


def test_a_job_that_lost_a_node_goes_on_with_the_other(cluster: Cluster, tmp_path: Path) -> None:
    words = [*PRETRAIN, "launch.elastic=true", "stages.pretrain.training.max_steps=40", "trainer.log_every_steps=1"]
    assert submit(cluster, tmp_path, *words).returncode == 0
    job = str(status(cluster, tmp_path)["pretrain"]["job"])
    until(lambda: kept_steps(tmp_path) >= 7, tmp_path)
    for state in ("DOWN", "DRAIN"):  # the latter, lest it come back by itself
        cluster.command("scontrol", "update", f"NodeName={NODES[1]}", f"State={state}", "Reason=test")
    try:
        until(lambda: finished(tmp_path), tmp_path)
    finally:
        cluster.command("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    text = log(cluster.job(job))
    assert "start 0: 2 x 1 ranks" in text
    assert "start 1: 1 x 1 ranks" in text
    (step,) = re.findall(r"goes on at step (\d+)/40", text)
    assert int(step) >= 5
    assert json.loads((tmp_path / "pretrain" / "manifest.json").read_text())["steps"] == 40


def test_jobs_of_an_array_share_out_what_is_recorded(cluster: Cluster, tmp_path: Path) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    words = ["teacher=cached", "encoding=top_k", "launch.resources.record.nodes=1"]
    assert submit(cluster, one, *words, "only=[pretrain,record]").returncode == 0
    until(lambda: (one / "record" / "manifest.json").exists(), one)
    asked = [*words, f"teacher.path={one / 'pretrain'}", "only=[record]", "launch.resources.record.jobs=2"]
    done = submit(cluster, several, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    until(lambda: (several / "record" / "manifest.json").exists(), several)
    same_signals(several / "record", one / "record")
    names = [path.name for path in (several / "record").glob("shard-*")]
    assert names
    assert not [name for name in names if name.startswith("shard-0000-")]  # the arrays' jobs made all
    assert len([*(several / "logs" / "record").glob("share-*-of-2/start-0/rank-00000.log")]) == 2
