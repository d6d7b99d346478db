"""Whole runs through the command line: what they leave, what they skip, refuse and survive."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import Refusal, StageFailed
from pipeline import artifact, prefork, run, run_folder, verdicts
from pipeline.artifact import content_hash
from pipeline.data.sequences import Sequences
from pipeline.verdicts import steps_of
from tests.command import ROOT, SMALL, start, train, unclocked, weights

STAGES = ("pretrain", "distill", "control")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    done = train(f"run_dir={run_dir}", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def test_every_artifact_opens_in_a_process_that_does_not_know_this_project(finished: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
assert not any(name.split(".")[0] in ("pipeline", "models", "callbacks") for name in sys.modules)
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer("The for statement", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None
    print(sum(p.numel() for p in model.parameters()))
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, *(str(finished / s) for s in STAGES)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((finished / "report.json").read_text())["rows"]
    assert [int(n) for n in done.stdout.split()] == [row["parameters"] for row in rows]


def test_the_manifest_tells_where_an_artifact_comes_from(finished: Path) -> None:
    manifest = json.loads((finished / "distill" / "manifest.json").read_text())
    teacher = finished / "pretrain"
    assert manifest["stage"] == "distill"
    assert manifest["parents"]["teacher"] == {"path": str(teacher), "content_hash": content_hash(teacher)}
    assert manifest["parents"]["data"]["content_hash"]
    assert manifest["config"]["objective"]["alpha"] == 0.5
    assert manifest["steps"] == 12
    assert manifest["tokens"] > 12 * 8 * 20
    assert manifest["seconds"] > 0
    assert manifest["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert manifest["run_config"]["strategy"]["_target_"] == "pipeline.training.strategy.Single"
    assert manifest["content_hash"] == content_hash(finished / "distill")


def test_the_report_is_measured_on_the_folders(finished: Path) -> None:
    """Perplexity again, by the dense formula, document by document."""
    from transformers import AutoModelForCausalLM

    report = json.loads((finished / "report.json").read_text())
    assert [row["stage"] for row in report["rows"]] == list(STAGES)
    test = Sequences(next((finished / "work" / "data").glob("test-*")))
    for row in report["rows"]:
        model = AutoModelForCausalLM.from_pretrained(row["path"]).double()
        nats, tokens = 0.0, 0
        for packed in test:
            starts = [i for i, p in enumerate(packed["position_ids"]) if p == 0] + [len(packed["position_ids"])]
            for begin, end in itertools.pairwise(starts):
                ids = torch.tensor(packed["input_ids"][begin:end])[None]
                targets = torch.tensor(packed["targets"][begin:end])
                with torch.no_grad():
                    logits = model(input_ids=ids).logits[0]
                nats += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
                tokens += int((targets >= 0).sum())
        assert row["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / sum(test["bytes"]), rel=1e-4)
        folder = Path(row["path"])
        assert row["bytes"] == sum(
            p.stat().st_size for p in folder.iterdir() if p.name not in ("manifest.json", "metrics.jsonl")
        )
        for name in ("generate_tokens_per_second", "prefill_tokens_per_second", "first_token_ms", "peak_memory_bytes"):
            assert row[name] > 0, name
    (comparison,) = report["comparisons"]
    assert comparison["difference"] == pytest.approx(report["rows"][1]["perplexity"] - report["rows"][2]["perplexity"])


def test_the_control_sees_the_same_data_from_the_same_start(finished: Path) -> None:
    distill, control = (json.loads((finished / s / "manifest.json").read_text()) for s in ("distill", "control"))
    for name in ("tokens", "steps", "seed"):
        assert distill[name] == control[name]
    assert distill["parents"] == control["parents"]
    differing = {k for k in distill["config"] if distill["config"][k] != control["config"][k]}
    assert differing == {"objective"}
    first = [json.loads((finished / s / "metrics.jsonl").read_text().splitlines()[0]) for s in ("distill", "control")]
    # the same weights on the same sequences: the cross-entropy of the first step is the same number
    assert first[0]["cross_entropy"] == pytest.approx(first[1]["cross_entropy"], abs=1e-6)


def test_nothing_of_a_finished_stage_is_left_in_the_work_folder(finished: Path) -> None:
    # Hashes are remembered only of files that have stood for a while.
    assert {p.name for p in (finished / "work").iterdir()} - {"hashes.json"} == {"data", "plan.json"}
    assert not list(finished.glob(".*.partial"))


def test_a_rerun_skips_what_is_finished_and_changes_nothing(finished: Path) -> None:
    before = {s: (finished / s / "manifest.json").stat().st_mtime_ns for s in STAGES}
    done = train(f"run_dir={finished}", *SMALL)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, skipped") == 4
    assert {s: (finished / s / "manifest.json").stat().st_mtime_ns for s in STAGES} == before


def test_other_values_in_a_run_folder_are_refused_with_the_ways_out(finished: Path) -> None:
    done = train(f"run_dir={finished}", *SMALL, "divergence.temperature=3")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    for word in ("divergence.temperature", "2.0", "3", "resume=overwrite", "run_dir=", "old values"):
        assert word in done.stderr


def test_what_only_the_machine_notices_is_no_reason_to_refuse(finished: Path) -> None:
    done = train(
        f"run_dir={finished}",
        *SMALL,
        "stages.distill.training.micro_batch=2",
        "logger=tensorboard",
        "trainer.checkpoint.every_steps=5",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, skipped") == 4


@pytest.mark.slow
def test_overwrite_redoes_the_stage_that_changed_and_those_after_it(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished, run_dir)
    done = train(f"run_dir={run_dir}", *SMALL, "objective.alpha=0.3", "resume=overwrite")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished, skipped") == 2  # pretrain and control
    assert json.loads((run_dir / "distill" / "manifest.json").read_text())["config"]["objective"]["alpha"] == 0.3
    old, new = (json.loads((d / "evaluate" / "manifest.json").read_text()) for d in (finished, run_dir))
    assert old["parents"]["distill"] != new["parents"]["distill"]


@pytest.mark.slow
def test_force_and_a_selection_of_stages(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "copy"
    shutil.copytree(finished, run_dir)
    done = train(f"run_dir={run_dir}", *SMALL, "stages=[distill,evaluate]", "force=distill")
    assert done.returncode == 0, done.stderr
    assert "pretrain: step" not in done.stdout
    assert "distill: step" in done.stdout
    for name, tensor in weights(finished / "distill").items():
        assert torch.equal(tensor, weights(run_dir / "distill")[name]), name


def test_two_commands_in_one_run_folder_are_kept_apart(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "busy"
    words = [f"run_dir={run_dir}", *SMALL, "stop=pretrain", "stages.pretrain.training.max_steps=100000"]
    first = start(*words)
    try:
        _wait_for(lambda: (run_dir / "work" / "pretrain").exists(), first)
        second = train(*words)
        assert second.returncode == 2
        assert "another command is working in it" in second.stderr
    finally:
        first.kill()
        first.wait()


# Where in a stage, so that each kind of half-finished work is met once. Of a checkpoint: tests/test_callbacks.py.
KILLS = {
    "while the tokenizer is written": ("os.rename", "tokenizer", 1),
    "while sequences are written": ("os.rename", "data", 1),
    "before the artifact is renamed": ("os.rename", ".pretrain.partial", 1),
}


@pytest.mark.parametrize("moment", [m if "artifact" in m else pytest.param(m, marks=pytest.mark.slow) for m in KILLS])
def test_a_stage_killed_at_a_file_operation_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, moment: str
) -> None:
    run_dir = tmp_path / "killed"
    words = [f"run_dir={run_dir}", *SMALL, "stop=pretrain"]
    event, part, count = KILLS[moment]
    killed = train(*words, path=str(ROOT / "tests" / "killing"), RETORT_TEST_KILL=f"{event} {part} {count}")
    assert killed.returncode not in (0, 2), killed.stdout
    assert not (run_dir / "pretrain").exists()
    again = train(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    _same_weights(finished / "pretrain", run_dir / "pretrain")
    assert _metrics(run_dir / "pretrain") == _metrics(finished / "pretrain")
    assert not list(run_dir.glob(".*.partial"))


def test_everything_killed_in_the_middle_of_a_step_goes_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """The front door itself gets SIGKILL, as a batch system would send it; its stage must not train on unseen."""
    run_dir = tmp_path / "killed"
    shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    words = [f"run_dir={run_dir}", *SMALL, "stages=[distill]"]
    process = start(*words)
    metrics = run_dir / "work" / "distill" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    size = metrics.stat().st_size
    time.sleep(1.0)
    assert metrics.stat().st_size == size, "an orphan is still training"
    again = train(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resume" in again.stdout
    _same_weights(finished / "distill", run_dir / "distill")


LONGER = ["stages=[distill]", "stages.distill.training.max_steps=200", "trainer.checkpoint.every_steps=null"]


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param([], id="one rank"),
        pytest.param(
            ["strategy=zero2", "trainer.accelerator=cpu", "trainer.devices=2"], id="one of two", marks=pytest.mark.slow
        ),
    ],
)
def test_a_training_that_is_given_notice_ends_after_its_step_and_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, ranks: list[str]
) -> None:
    whole, noticed = tmp_path / "whole", tmp_path / "noticed"
    for run_dir in (whole, noticed):
        shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    words = [*SMALL, *LONGER, *ranks]
    assert train(f"run_dir={whole}", *words).returncode == 0
    work, last = noticed / "work" / "distill", 0
    for number, status in ((signal.SIGUSR1, 75), (signal.SIGTERM, 143), (signal.SIGUSR1, 75)):
        log = tmp_path / f"log {last}"
        process = start(f"run_dir={noticed}", *words, log=log)
        _wait_for(lambda: any(step > last + 2 for step in _steps_told(work)), process)  # noqa: B023
        os.kill(_last_rank(noticed) if ranks and number == signal.SIGUSR1 else process.pid, number)
        assert process.wait() == status, log.read_text()
        steps = steps_of(work)
        assert f"stopped after step {steps[-1]}, its checkpoint is saved" in log.read_text()
        assert steps[-1] > last + 2  # and no checkpoint was due
        last = steps[-1]
    again = train(f"run_dir={noticed}", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"goes on at step {last}/200" in again.stdout
    _same_weights(whole / "distill", noticed / "distill")
    assert _metrics(noticed / "distill") == _metrics(whole / "distill")


def _steps_told(work: Path) -> list[int]:
    metrics = work / "metrics.jsonl"
    lines = metrics.read_text().splitlines()[:-1] if metrics.exists() else []
    return [json.loads(line)["step"] for line in lines]


def _last_rank(run_dir: Path) -> int:
    """The process of a rank, and not torchrun's, whose command holds that of its ranks."""
    found = subprocess.run(["pgrep", "-f", f"pipeline.worker run {run_dir}"], capture_output=True, text=True)
    ranks = [pid for pid in found.stdout.split() if "torchrun" not in Path(f"/proc/{pid}/cmdline").read_text()]
    return int(ranks[-1])


@pytest.mark.parametrize(
    ("before", "after", "status"),
    [([], [7], 75), ([], [], 75), ([4, 8], [4, 8], 1), ([4, 8], [8, 9], 75)],
    ids=["first steps", "no training", "no step", "some steps"],
)
def test_a_job_that_gains_no_step_is_not_to_be_queued_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: list[int], after: list[int], status: int
) -> None:
    monkeypatch.setattr(run, "steps_of", lambda work: after)
    with pytest.raises(StageFailed) as ended:
        run._end_early("distill", tmp_path, before, 75, tmp_path, idle=False)
    assert ended.value.code == status


BETWEEN = {
    # the front door asks for the check, distill, and control: killed as it asks
    "two stages": "socket.sendmsg socket 3",
    # the third time, of which one is before the stages and one before distill
    "a result and the removal of its work": "shutil.rmtree .distill.old 3",
}


@pytest.mark.parametrize("moment", ["two stages", pytest.param([*BETWEEN][1], marks=pytest.mark.slow)])
def test_a_command_killed_between_two_stages_goes_on_with_the_second(
    finished: Path, tmp_path: Path, moment: str
) -> None:
    run_dir = tmp_path / "killed"
    shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    words = [f"run_dir={run_dir}", *SMALL, "stages=[distill,control]"]
    killed = train(*words, path=str(ROOT / "tests" / "killing"), RETORT_TEST_KILL=BETWEEN[moment])
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    _same_weights(finished / "distill", run_dir / "distill")
    assert not (run_dir / "control").exists()
    assert (run_dir / "work" / "distill").exists() == ("removal" in moment)
    again = train(*words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "distill: finished, skipped" in again.stdout
    assert "distill: step" not in again.stdout
    _same_weights(finished / "control", run_dir / "control")
    assert not (run_dir / "work" / "distill").exists()


@pytest.mark.slow
def test_two_ranks_die_with_the_command_and_go_on_to_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """torchrun stands between: it and its ranks must not outlive what started them."""
    words = [*SMALL, "stages=[distill]", "strategy=zero2", "trainer.accelerator=cpu", "trainer.devices=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for run_dir in (whole, killed):
        shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    assert train(f"run_dir={whole}", *words).returncode == 0
    process = start(f"run_dir={killed}", *words)
    metrics = killed / "work" / "distill" / "metrics.jsonl"
    _wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 4, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(1.0)
    processes = subprocess.run(["pgrep", "-f", f"pipeline.worker run {killed}"], capture_output=True, text=True)
    assert processes.stdout == "", "a rank is still alive"
    again = train(f"run_dir={killed}", *words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resume" in again.stdout
    _same_weights(whole / "distill", killed / "distill")


@pytest.mark.slow
def test_a_forced_stage_that_is_killed_goes_on_too(finished: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "killed"
    shutil.copytree(finished, run_dir)
    words = [f"run_dir={run_dir}", *SMALL, "stages=[control]", "force=control"]
    killing = {"path": str(ROOT / "tests" / "killing"), "RETORT_TEST_KILL": "os.rename .control.partial 1"}
    assert train(*words, **killing).returncode not in (0, 2)  # all steps done, the result not yet in place
    assert content_hash(run_dir / "control") == content_hash(finished / "control")  # the old one, whole
    again = train(*words)
    assert again.returncode == 0, again.stderr
    assert "resume" in again.stdout
    assert "control: step 2/" not in again.stdout
    _same_weights(finished / "control", run_dir / "control")


@pytest.mark.slow
def test_a_training_is_taken_up_from_an_earlier_checkpoint_with_another_learning_rate(
    finished: Path, tmp_path: Path
) -> None:
    """Killed when its second checkpoint was in place, as by a loss that is no number."""
    run_dir = tmp_path / "turned"
    shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    words = [f"run_dir={run_dir}", *SMALL, "stages=[distill]"]
    assert train(*words, path=str(ROOT / "tests" / "killing"), RETORT_TEST_KILL="os.rename step-00000012 1").returncode
    turn = [*words, "resume.from_step=4", "optimizer.lr=1e-5", "resume.skip_sequences=[3]"]
    # killed again: the same command goes on, and does not go back once more
    assert train(*turn, path=str(ROOT / "tests" / "killing"), RETORT_TEST_KILL="os.rename step-00000012 1").returncode
    done = train(*turn)
    assert done.returncode == 0, done.stderr
    assert "goes on at step 8/12" in done.stdout
    manifest = json.loads((run_dir / "distill" / "manifest.json").read_text())
    (told,) = manifest["turns"]
    assert (told["step"], told["skipped"]) == (4, [3])
    assert ["training.optimizer.lr", 0.006, 1e-5] in told["changed"]
    assert manifest["config"]["training"]["optimizer"]["lr"] == 1e-5
    before, after = (
        {line["step"]: line for line in _metrics(d / "distill") if "loss" in line} for d in (finished, run_dir)
    )
    assert [after[step] == before[step] for step in (2, 4)] == [True, True]
    scale = after[6]["learning_rate"] / before[6]["learning_rate"]
    assert scale == pytest.approx(1e-5 / 0.006)
    assert "distill was taken up at step 4" in (run_dir / "report.md").read_text()
    assert "distill: finished, skipped" in train(*turn).stdout


@pytest.mark.slow
def test_a_training_that_ended_with_nan_is_told_another_way_on_than_the_same_command(tmp_path: Path) -> None:
    words = [f"run_dir={tmp_path / 'run'}", *SMALL, "stages=[pretrain]", "trainer.accelerator=cpu"]
    high = [*words, "stages.pretrain.training.optimizer.lr=1e30", "stages.pretrain.training.schedule.warmup_steps=0"]
    ended = train(*high)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    *_, found, told = ended.stderr.strip().splitlines()
    assert re.search(r"step \d+: the (loss|gradient's norm) is nan on sequences \[\d+", found), found
    assert "stage pretrain failed with exit status 3; the same command would end alike, and no checkpoint" in told
    assert "run it again with a lower stages.pretrain.training.optimizer.lr= (it is 1e+30)" in told
    kept = tmp_path / "run" / "logs" / "pretrain" / "start-0"
    assert found in (kept / "rank-00000.log").read_text()
    error = json.loads((kept / "error.json").read_text())
    assert (error["stage"], error["rank"], error["status"], error["host"]) == ("pretrain", 0, 3, socket.gethostname())
    assert error["message"] in found
    assert re.match(r"(callbacks|models|pipeline)/[\w/]+\.py:\d+ in \w+$", error["where"])
    status = train("status", f"run_dir={tmp_path / 'run'}").stdout
    assert f"pretrain failed on rank 0 ({socket.gethostname()}), at {error['where']}: {error['message']}" in status
    assert train(*words).returncode == 0


@pytest.mark.parametrize("changes", [50, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("harm", ["flip", "cut"])
def test_no_change_of_any_file_of_a_finished_run_goes_unseen(
    finished: Path, tmp_path: Path, harm: str, changes: int
) -> None:
    """Random changes: of a stage's folder or of prepared text they are told, elsewhere nothing is made of
    them."""
    run_dir = tmp_path / "changed"
    shutil.copytree(finished, run_dir)
    config = {**json.loads((run_dir / "config.json").read_text()), "run_dir": str(run_dir)}
    plan = _plan_of(run_dir, config)
    hashes = run_dir / "work" / "hashes.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artifact, "_SETTLED_NS", 0)  # the hashes of the copy are remembered, too
        assert _skips_all(run_dir, config, plan)
        assert all(artifact.sealed(folder) for folder in (run_dir / "work" / "data").glob("[!.]*"))
    files = [path for path in sorted(run_dir.rglob("*")) if path.is_file() and path.stat().st_size]
    assert hashes in files
    draw = random.Random(f"{harm} 0")
    unseen = []
    for turn in range(changes):
        path = hashes if turn % 10 == 0 else draw.choice(files)
        before, _ = path.read_bytes(), _harm(path, harm, draw)
        if not _is_told_or_harmless(run_dir, config, plan, path):
            unseen.append(str(path.relative_to(run_dir)))
        path.write_bytes(before)
    assert unseen == []


def _harm(path: Path, harm: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    path.write_bytes(content if harm == "flip" else content[:place])


def _plan_of(run_dir: Path, config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the check of the same command would say of the stages, as far as it decides what is to be done."""
    plan = {}
    for stage in config["order"]:
        if (told := artifact.read_manifest(run_dir / stage)) is None:
            continue
        parents = {role: str(run_dir / Path(each["path"]).name) for role, each in told["parents"].items()}
        parents.pop("data", None)
        content = told["parents"].get("data", {}).get("content_hash", "")
        data = {"train": {"sources": []}}
        plan[stage] = {"identity": told["config"], "parents": parents, "commits": {}, "content": content, "data": data}
    assert plan.keys() >= {*STAGES, "evaluate"}
    return plan


def _skips_all(run_dir: Path, config: dict[str, Any], plan: dict[str, dict[str, Any]]) -> bool:
    """Whether the same command would skip every stage, and knows the true hashes of their parents."""
    run_folder.check_ours(run_dir)
    jobs = verdicts.jobs_of(config, plan)
    true = all(
        each["content_hash"] == artifact.content_hash(run_dir / Path(each["path"]).name)
        for job in jobs
        for role, each in verdicts.parents_of(config, job["plan"]).items()
        if role != "data"
    )
    return true and {job["do"] for job in jobs} == {"skip"}


def _is_told_or_harmless(run_dir: Path, config: dict[str, Any], plan: dict[str, dict[str, Any]], path: Path) -> bool:
    top, *below = path.relative_to(run_dir).parts
    try:
        skips = _skips_all(run_dir, config, plan)
    except Refusal:
        return top in config["stages"]
    data = run_dir / "work" / "data"
    changed = [folder.name for folder in sorted(data.glob("[!.]*")) if not artifact.sealed(folder)]  # made again
    mine = [below[1]] if top == "work" and below[0] == "data" and not below[1].startswith(".") else []
    return skips and changed == mine and top not in config["stages"]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("changes", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_no_change_of_any_file_of_an_unfinished_stage_goes_unseen(
    finished: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: int
) -> None:
    """Random changes: each is refused in one line, or the stage ends at the bits of an uninterrupted one."""
    run_dir, pristine = tmp_path / "changed", tmp_path / "killed"
    shutil.copytree(finished / "pretrain", run_dir / "pretrain")
    words = [f"run_dir={run_dir}", *SMALL, "stages=[distill]"]
    killed = train(*words, path=str(ROOT / "tests" / "killing"), RETORT_TEST_KILL="os.rename step-00000012 1")
    assert killed.returncode not in (0, 2), killed.stdout + killed.stderr
    work = run_dir / "work" / "distill"
    os.rename(work, pristine)
    config = json.loads((run_dir / "config.json").read_text())
    files = [path for path in sorted(pristine.rglob("*")) if path.is_file() and path.stat().st_size]
    kinds: dict[str, list[Path]] = {}
    for path in files:
        kinds.setdefault(path.relative_to(pristine).parts[0], []).append(path)
    assert kinds.keys() >= {"stage.json", "checkpoints", "metrics.jsonl", "start", "prepared.json"}
    draw, unseen, refused = random.Random(0), [], 0
    with prefork.server(config, ["distill"]) as server:
        (entry,) = run._check({"config": config, "stages": ["distill"], "typed": {}}, server)["plan"]
        for turn in range(changes):
            shutil.rmtree(run_dir / "distill", ignore_errors=True)
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(pristine, work)
            path = work / draw.choice([*kinds.values()][turn % len(kinds)]).relative_to(pristine)
            _harm(path, draw.choice(["flip", "cut"]), draw)
            capfd.readouterr()
            told = []
            try:
                with run_folder.claimed(run_dir) as lock:
                    (job,) = verdicts.jobs_of(config, {"distill": entry})
                    assert job["do"] == "resume"
                    run._run_stage(config, job, lock, server)
            except (Refusal, StageFailed) as problem:
                said = capfd.readouterr().err
                told = [str(problem), *said.splitlines()] if isinstance(problem, Refusal) else said.splitlines()
                refused += 1
                if len([line for line in told if line]) != 1:
                    unseen.append((str(path.relative_to(work)), told))
                continue
            if not _same(finished / "distill", run_dir / "distill"):
                unseen.append((str(path.relative_to(work)), ["other weights"]))
    assert unseen == []
    assert 0 < refused < changes


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_at_random_moments_the_chain_ends_at_the_same_bits(finished: Path, tmp_path: Path) -> None:
    """50 times, at any moment from the start of the command on, also while a checkpoint or an artifact is written."""
    draw, run_dir, killed = random.Random(0), tmp_path / "killed", 0
    words = [f"run_dir={run_dir}", *SMALL, "trainer.checkpoint.every_steps=1"]
    while killed < 50:
        process = start(*words)
        try:
            assert process.wait(timeout=draw.uniform(1, 18)) == 0
            for stage in STAGES:
                _same_weights(finished / stage, run_dir / stage)
            shutil.rmtree(run_dir)
        except subprocess.TimeoutExpired:
            process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
            process.wait()
            killed += 1
    done = train(*words)
    assert done.returncode == 0, done.stderr
    for stage in STAGES:
        _same_weights(finished / stage, run_dir / stage)


@pytest.mark.slow
@pytest.mark.parametrize("kilobytes", [1, 4, 16, 40, 64, 100, 200, 400])
def test_a_limit_on_what_can_be_written_is_told_in_one_line_and_loses_nothing(
    finished: Path, tmp_path: Path, kilobytes: int
) -> None:
    words = [f"run_dir={tmp_path / 'run'}", *SMALL, "stop=distill"]
    done = train(*words, limit=kilobytes * 1000)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, done.stderr
        assert "are free there" in errors[0]
    assert train(*words).returncode == 0
    for stage in ("pretrain", "distill"):
        _same_weights(finished / stage, tmp_path / "run" / stage)


def _same(one: Path, other: Path) -> bool:
    mine, theirs = weights(one), weights(other)
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def _same_weights(one: Path, other: Path) -> None:
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def _metrics(folder: Path) -> list[dict[str, float]]:
    """Without what a clock decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [unclocked(line) for line in lines]


def _wait_for(condition: object, process: subprocess.Popen[str], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if condition():  # type: ignore[operator]
            return
        assert process.poll() is None, "the command ended too early"
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")
