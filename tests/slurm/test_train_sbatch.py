"""slurm/train.sbatch on a real Slurm with two pretended nodes: what a user submits, and what is there in the end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.slurm.throwaway import Cluster, log

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "slurm" / "train.sbatch")
# one rank on each node; processors and GPUs are only numbers here
RANKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
FLAGSHIP = [
    "+experiment=distill_7b_to_1b",
    "+scale=tiny",
    "logger=csv",
    "stages.distill.training.max_steps=30",
    "trainer.checkpoint.every_steps=2",
    "trainer.checkpoint.keep=99",
]

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def submit(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """sbatch in the checkout."""
    logs = tmp_path_factory.mktemp("logs")
    return lambda *words: cluster.submit(*RANKS, f"--output={logs}/%j.log", SCRIPT, *words, cwd=ROOT)


@pytest.fixture(scope="module")
def run_dir(cluster: Cluster, submit: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny flagship, run to its end."""
    folder = tmp_path_factory.mktemp("run")
    record = cluster.wait(submit(*FLAGSHIP, f"run_dir={folder}"), seconds=600)
    assert record["JobState"] == "COMPLETED", log(record)
    return folder


def test_the_finished_student_opens_without_the_project(run_dir: Path, tmp_path: Path) -> None:
    program = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
batch = tokenizer("The meaning of a word", return_tensors="pt")
assert torch.isfinite(model(**batch).logits).all()
print(sum(p.numel() for p in model.parameters()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(run_dir / "distill")],
        cwd=tmp_path,
        text=True,
        env={"PATH": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run_dir / "distill" / "manifest.json").read_text())
    assert manifest["steps"] == 30
    assert int(done.stdout) == manifest["metrics"]["parameters"]


def test_the_report_has_a_row_for_teacher_and_student(run_dir: Path) -> None:
    rows = json.loads((run_dir / "report.json").read_text())["rows"]
    stages = list(dict.fromkeys(row["stage"].partition("/")[0] for row in rows))
    assert stages == ["pretrain", "distill", "prune", "recover", "quantize", "qat", "export"]
    for row in rows:
        assert 1 < row["perplexity"] < 600  # not worse than guessing among the 512 tokens by much
        assert row["generate_tokens_per_second"] > 0


def test_a_requeued_job_goes_on_from_its_checkpoint_to_the_same_weights(
    cluster: Cluster, submit: Callable[..., str], run_dir: Path, tmp_path: Path
) -> None:
    """As after a dead node: everything is killed in the middle of `distill`, and the same job is started again."""
    teacher = f"teacher.path={run_dir}/pretrain"
    job = submit(*FLAGSHIP, teacher, "stages=[distill]", f"run_dir={tmp_path}")
    checkpoints = tmp_path / "work" / "distill" / "checkpoints"
    cluster.wait(job, seconds=300, until=lambda: len(saved(checkpoints)) > 1)
    step = cluster.command("scontrol", "show", "step", job)
    cluster.command("scontrol", "requeue", job)
    shards = {
        int(rank)
        for path in saved(checkpoints)[-1].glob("rank-*.safetensors")
        for rank in re.findall(r"rank-(\d+)", path.name)
    }
    record = cluster.wait(job, seconds=600)
    text = log(record)
    assert record["JobState"] == "COMPLETED", text
    assert record["Restarts"] == "1"
    assert "Nodes=2" in step
    assert "Tasks=2" in step
    assert shards == {0, 1}  # both ranks worked
    first, second = re.split(r"^job \d+, start 1: 2 x 1 ranks", text, flags=re.M)  # the log was appended to
    assert "goes on at step" not in first
    assert int(re.findall(r"distill: goes on at step (\d+)/30", second)[0]) >= 4
    assert steps(tmp_path / "distill") == steps(run_dir / "distill")
    assert weights(tmp_path / "distill") == weights(run_dir / "distill")


def test_a_job_that_is_given_notice_saves_and_is_queued_again_until_it_is_done(
    cluster: Cluster, submit: Callable[..., str], run_dir: Path, tmp_path: Path
) -> None:
    """As before its time limit: the batch script gets USR1, twice; no checkpoint was due."""
    words = [*FLAGSHIP, f"teacher.path={run_dir}/pretrain", "stages=[distill]", "trainer.checkpoint.every_steps=null"]
    job, work = submit(*words, f"run_dir={tmp_path}"), tmp_path / "work" / "distill"
    last = 0
    for restarts in (1, 2):
        before = len(saved(work / "checkpoints"))
        cluster.wait(job, seconds=300, until=partial(has_learnt, work, last + 3))
        cluster.command("scancel", "--batch", "--signal=USR1", job)
        cluster.wait(job, seconds=300, until=partial(has_restarted, cluster, job, restarts))
        assert len(saved(work / "checkpoints")) == before + 1
        last = int(saved(work / "checkpoints")[-1].name.removeprefix("step-"))
    record = cluster.wait(job, seconds=600)
    text = log(record)
    assert record["JobState"] == "COMPLETED", text
    assert re.findall(r"goes on at step (\d+)/30", text) == re.findall(
        r"stopped after step (\d+), its checkpoint", text
    )
    assert weights(tmp_path / "distill") == weights(run_dir / "distill")
    assert steps(tmp_path / "distill") == steps(run_dir / "distill")


def test_a_cancelled_job_saves_and_is_not_queued_again(
    cluster: Cluster, submit: Callable[..., str], run_dir: Path, tmp_path: Path
) -> None:
    words = [*FLAGSHIP, f"teacher.path={run_dir}/pretrain", "stages=[distill]", "trainer.checkpoint.every_steps=null"]
    job, work = submit(*words, f"run_dir={tmp_path}"), tmp_path / "work" / "distill"
    cluster.wait(job, seconds=300, until=partial(has_learnt, work, 4))
    cluster.command("scancel", job)
    record = cluster.wait(job, seconds=120)
    assert (record["JobState"], record["Restarts"]) == ("CANCELLED", "0"), log(record)
    assert saved(work / "checkpoints")


def test_the_allocation_decides_over_ranks_and_their_exit_status_travels_up(cluster: Cluster, tmp_path: Path) -> None:
    """The script's own defaults on two nodes, in a checkout whose train.py only starts ranks, which end with 75."""
    (tmp_path / "train.py").write_text(f"""
import subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
from pipeline.launch import Slurm
told = dict(word.split("=") for word in sys.argv[1:])
print(told, flush=True)
nodes, devices = int(told["trainer.nodes"]), int(told["trainer.devices"])
sys.exit(subprocess.run(Slurm().command(["rank"], ranks=nodes * devices, nodes=nodes)).returncode)
""")
    (tmp_path / "rank.py").write_text("""
import os, sys, time
names = "SLURM_PROCID", "SLURM_NODEID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_NNODES", "SLURM_NODELIST"
print("rank", *(os.environ[name] for name in names), flush=True)
if os.environ["SLURM_PROCID"] == "3":
    time.sleep(1)  # the last to end is still let do so
sys.exit(75)
""")
    never = "--export=ALL,RETORT_MAX_STARTS=0"  # else a job that ends with 75 is queued again
    job = cluster.submit("--nodes=2", never, SCRIPT, "seed=3", cwd=tmp_path)
    record = cluster.wait(job, seconds=120)
    text = (tmp_path / f"slurm-retort-{job}.log").read_text()
    assert (record["JobState"], record["ExitCode"]) == ("FAILED", "75:0"), text
    assert "{'launch': 'slurm', 'trainer.nodes': '2', 'trainer.devices': '8', 'seed': '3'}" in text
    ranks = {tuple(line.split()[1:]) for line in text.splitlines() if line.startswith("rank ")}
    assert ranks == {(str(rank), str(rank // 8), str(rank % 8), "16", "2", "127.0.0.[1-2]") for rank in range(16)}


def has_learnt(work: Path, step: int) -> bool:
    metrics = work / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []  # the last may be half written
    return any(json.loads(line)["step"] >= step for line in lines)


def has_restarted(cluster: Cluster, job: str, times: int) -> bool:
    return f"Restarts={times}" in cluster.command("scontrol", "show", "job", job)


def saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"))


def steps(folder: Path) -> list[tuple[int, float]]:
    """Step and loss, in the order they were written."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def weights(folder: Path) -> str:
    """Their hash."""
    told: str = json.loads((folder / "manifest.json").read_text())["files"]["model.safetensors"]["sha256"]
    return told
