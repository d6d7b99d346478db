"""The jobs that a run becomes on a cluster: what each asks for and does, without Slurm. tests/slurm submits them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.errors import STOPPED, TERMINATED, Refusal, StageFailed
from pipeline import artifact, run_folder, submission
from pipeline.launch import Slurm
from pipeline.resources import Resources
from pipeline.run import _end_early
from pipeline.submission import Job, Run, _waits_for, planned, scripts, submit
from tests.command import ROOT, train
from tests.test_config import refused, unrefused

TINY = ["+experiment=distill_7b_to_1b", "+scale=tiny", "launch=slurm", "dry_run=true", "logger=csv"]


@pytest.fixture(autouse=True)
def login_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


def needs(*words: str) -> dict[str, dict[str, Any]]:
    return {entry["stage"]: entry["needs"] for entry in unrefused(*TINY, *words)}


def test_stages_that_train_ask_for_the_ranks_of_the_trainer_and_the_others_for_one() -> None:
    found = needs("trainer.nodes=2")
    assert [(name, each["run"]["nodes"], each["run"]["ranks_per_node"]) for name, each in found.items()] == [
        ("pretrain", 2, 2),
        ("distill", 2, 2),
        ("prune", 2, 2),
        ("recover", 2, 2),
        ("quantize", 1, 1),
        ("qat", 2, 2),
        ("export", 1, 1),
        ("evaluate", 1, 1),
    ]
    assert {name for name, each in found.items() if each["prepare"]} == {
        "pretrain",
        "distill",
        "prune",
        "recover",
        "qat",
    }


def test_a_job_that_tokenizes_holds_no_gpu_and_evaluate_holds_one() -> None:
    gpus = ["trainer.accelerator=auto", "trainer.devices=auto"]
    batches = [f"stages.{name}.training.micro_batch=1" for name in ("pretrain", "distill", "recover", "qat")]
    entries = unrefused(*TINY, *gpus, *batches)
    found = {entry["stage"]: entry for entry in entries}
    distill, evaluate = found["distill"], found["evaluate"]
    assert (distill["needs"]["run"]["gpus_per_node"], distill["ranks"], distill["device"]) == (8, 8, "cuda")
    assert (distill["needs"]["prepare"]["gpus_per_node"], distill["needs"]["prepare"]["nodes"]) == (0, 1)
    assert (evaluate["needs"]["run"]["gpus_per_node"], evaluate["needs"]["prepare"]) == (1, None)


def test_a_stages_own_resources_come_first_key_by_key() -> None:
    own = [
        "launch.resources.distill.nodes=2",
        "launch.resources.distill.time=2-00:00:00",
        "launch.resources.qat.prepare=null",
    ]
    found = needs(*own, "launch.resources.recover.prepare.memory=1G")
    assert (found["distill"]["run"]["nodes"], found["distill"]["run"]["time"]) == (2, "2-00:00:00")
    assert found["distill"]["run"]["cpus_per_rank"] == found["recover"]["run"]["cpus_per_rank"] == 8
    assert found["recover"]["run"]["nodes"] == 1
    assert found["qat"]["prepare"] is None
    assert (found["recover"]["prepare"]["memory"], found["distill"]["prepare"]["memory"]) == ("1G", "128G")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("launch.resources.distil.nodes=2", "launch.resources.distil: no stage of this run; did you mean distill?"),
        ("launch.resources.record={jobs:4}", "launch.resources.record: no stage of this run"),
        ("launch.resources.distill.gpus=2", "launch.resources.distill.gpus: unknown"),
        ("launch.resources.distill.nodes=0", "launch.resources.distill.nodes=0: need a whole number of at least 1"),
        ("launch.resources.export.nodes=2", "launch.resources.export.nodes=2: this stage is one process; leave it out"),
        ("launch.resources.distill.gpus_per_node=1", "ranks_per_node is 2; give the same number"),
        ("launch.resources.distill.gpus_per_node=2", "trainer.accelerator=cpu: launch.resources asks for GPUs"),
        ("launch.resources.distill.time=null", "launch.resources.distill.time=None: need a text"),
        ("launch.resources.distill.time=abc", "launch.resources.distill.time=abc: need HOURS:MINUTES:SECONDS"),
        (
            "launch.resources.distill.time=43200",
            'time=43200: need HOURS:MINUTES:SECONDS, in a file within quotes, as "12',
        ),
        ("launch.resources.distill.time='90'", "time=90: need HOURS:MINUTES:SECONDS, in a file within quotes"),
        ("launch.resources.distill.time='24:00'", "time=24:00: need HOURS:MINUTES:SECONDS"),
        ("launch.resources.distill.time='0:05:00'", "a job has notice 5 minutes before its end, and makes way"),
        ("launch.resources.distill.time=0-0", "time=0-0: a job has notice 5 minutes before its end"),
        ("launch.resources.distill.time=-5", "launch.resources.distill.time=-5: need HOURS:MINUTES:SECONDS"),
        ("launch.resources.distill.memory=lots", "launch.resources.distill.memory=lots: need a number with its unit"),
        ("launch.resources.distill.memory=64", "launch.resources.distill.memory=64: need a number with its unit"),
        ("launch.resources.distill.partition='a b'", "launch.resources.distill.partition=a b: need the name"),
        ("+launch.resources.distill.options=--foo", "launch.resources.distill.options=--foo: need a list"),
        ("launch.site.setup=module", "launch.site.setup=module: need a list of texts"),
        ("+launch.site.acount=x", "launch.site.acount: unknown; did you mean account?"),
        ("launch/site=juwels", "launch/site=juwels: no such choice"),
        (
            "stages.distill.training.global_batch=7",
            "is not a multiple of stages.distill.training.micro_batch=2 × 2 ranks",
        ),
    ],
)
def test_what_a_job_cannot_ask_for_is_refused_on_the_login_node(word: str, told: str) -> None:
    assert told in refused(*TINY, word)


def options(text: str) -> list[str]:
    """Of sbatch, as it reads a script."""
    return [shlex.split(line.removeprefix("#SBATCH "))[0] for line in text.splitlines() if line.startswith("#SBATCH ")]


def one_job(folder: Path, words: list[str], **launch: Any) -> Run:
    resources = Resources(nodes=4, ranks_per_node=8, gpus_per_node=8, cpus_per_rank=8, memory="0", time="1:00:00")
    config = {"name": "x", "run_dir": str(folder), "launch": launch, "dry_run": False}
    return Run(config, ["distill"], [Job("distill", "run", resources, words)])


def run_script(text: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A job script with a train.py that only says its words."""
    (folder / "train.py").write_text("import sys, os\nprint(sys.argv[1:], os.environ.get('SITE'), flush=True)\n")
    text = text.replace(shlex.quote(str(ROOT)), shlex.quote(str(folder)))
    env = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]"}
    env |= {
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_SUBMIT_DIR": str(folder),
        "RETORT_PYTHON": sys.executable,
        **environment,
    }
    return subprocess.run(["bash"], input=text, env=env, capture_output=True, text=True, cwd=folder)


def test_a_job_script_hands_on_every_word_as_it_was_typed_and_what_the_site_sets(tmp_path: Path) -> None:
    words = ["+experiment=distill", "data.train='a b.jsonl'", "x=$HOME", 'y=["*"]']
    site = {"setup": ["export SITE=here"], "account": "lab", "partition": "gpu", "options": ["--exclusive"]}
    ((_, text),) = scripts([one_job(tmp_path / "a run", words, site=site)])
    done = run_script(text, tmp_path)
    said = ["launch=slurm", "trainer.nodes=4", "trainer.devices=8", *words]
    assert f"{said} here" in done.stdout, done.stderr
    assert {"--account=lab", "--partition=gpu", "--exclusive", "--nodes=4", "--gpus-per-node=8"} <= {*options(text)}
    assert f"--output={tmp_path}/a run/logs/distill/job-%j.log" in options(text)


def test_an_elastic_job_may_start_on_fewer_nodes(tmp_path: Path) -> None:
    ((_, text),) = scripts([one_job(tmp_path, [], elastic=True)])
    assert {"--nodes=1-4", "--gpus-per-node=8", "--cpus-per-task=64"} <= {*options(text)}
    assert "--ntasks-per-node" not in text  # with which Slurm gives fewer nodes than there are
    done = run_script(text, tmp_path, SLURM_JOB_NUM_NODES="3", SLURM_NTASKS_PER_NODE="")
    assert "['launch=slurm', 'trainer.nodes=3', 'trainer.devices=8']" in done.stdout


@pytest.mark.parametrize(("given", "used"), [(4, 4), (3, 2), (1, 1)])
def test_an_elastic_job_uses_as_many_nodes_as_share_out_the_batch(
    given: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert Slurm(elastic=True).nodes(given, 8, [(256, 2)]) == used
    assert Slurm().nodes(given, 8, [(256, 2)]) == given


def test_a_sweep_is_an_array_whose_tasks_have_their_own_words_and_logs(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        (folder / "logs" / "distill").mkdir(parents=True)
    ((_, text),) = scripts([one_job(folder, [f"run_dir={folder}", f"seed={at}"]) for at, folder in enumerate(folders)])
    assert "--array=0-1" in options(text)
    for at, folder in enumerate(folders):
        run_script(text, tmp_path, SLURM_ARRAY_TASK_ID=str(at), SLURM_ARRAY_JOB_ID="7")
        assert f"'seed={at}'" in (folder / "logs" / "distill" / f"job-7_{at}.log").read_text()


def test_runs_of_a_sweep_that_need_other_jobs_are_not_made_one_array(tmp_path: Path) -> None:
    one, other = one_job(tmp_path / "a", []), one_job(tmp_path / "b", [])
    with pytest.raises(Refusal, match="needs other jobs than"):
        scripts([one, Run(other.config, [], [])])


@pytest.mark.parametrize(
    "time", ["1:0:0", "0:5:1", "1-4:30:0", "12:00:00", "2-00", "2-12:30", "2-12:30:00", "UNLIMITED"]
)
def test_times_as_sbatch_takes_them_pass(time: str) -> None:
    assert needs(f"launch.resources.distill.time='{time}'")["distill"]["run"]["time"] == time


def test_two_runs_of_a_sweep_are_not_submitted_into_one_folder(tmp_path: Path) -> None:
    one, other = one_job(tmp_path / "a", ["seed=0"]), one_job(tmp_path / "a", ["seed=1"])
    with pytest.raises(Refusal, match="two runs of this sweep have the same folder; leave run_dir out"):
        scripts([one, other])


def verdict(name: str, do: str) -> dict[str, Any]:
    run = {"nodes": 1, "ranks_per_node": 2, "gpus_per_node": 2, "cpus_per_rank": 8, "memory": "0", "time": "1"}
    return {"stage": name, "do": do, "plan": {"needs": {"run": run, "prepare": None}}}


def test_finished_stages_have_no_job_and_what_concerns_one_stage_goes_to_its_job_alone(tmp_path: Path) -> None:
    resume = {"from_step": 20, "skip_sequences": [3], "mode": "continue"}
    config = {"run_dir": "/r", "force": ["export"], "resume": resume, "prepare_only": False}
    words = ["+experiment=x", "force=[export]", "stop=export", "resume.from_step=20", "trainer.nodes=2", "run_dir=r"]
    verdicts = [verdict("pretrain", "skip"), verdict("distill", "turn"), verdict("export", "redo")]
    found = planned(config, verdicts, words)
    assert [(job.stage, job.words) for job in found.jobs] == [
        (
            "distill",
            ["+experiment=x", "run_dir=/r", "only=[distill]", "resume.from_step=20", "resume.skip_sequences=[3]"],
        ),
        ("export", ["+experiment=x", "run_dir=/r", "only=[export]", "force=[export]"]),
    ]
    assert found.stages == ["pretrain", "distill", "export"]


def test_the_text_of_a_stage_that_trains_is_shared_out_by_an_array_of_jobs(tmp_path: Path) -> None:
    found = needs("launch.resources.distill.prepare.jobs=3", "launch.resources.prune.prepare.jobs=3")
    config = {"name": "x", "run_dir": str(tmp_path), "force": [], "launch": {}, "prepare_only": False}
    config |= {"resume": {"from_step": None}, "stages": {"distill": {"training": {}}, "prune": {}}}
    verdicts = [{"stage": name, "do": "start", "plan": {"needs": found[name]}} for name in ("distill", "prune")]
    run = planned(config, verdicts, ["+experiment=x"])
    names = [job.name for job in run.jobs]
    assert names == ["distill.share", "distill.prepare", "distill", "prune.prepare", "prune"]
    text = scripts([run])[0][1]
    assert "--array=1-3" in options(text)
    assert "prepare_data=2/3" in run_script(text, tmp_path, SLURM_ARRAY_TASK_ID="2").stdout
    other = Run({**run.config, "run_dir": f"{run.folder}-other"}, run.stages, run.jobs)
    assert [job.name for job, _ in scripts([run, other])] == names[1:]  # in a sweep, which is an array itself


def test_stages_that_train_are_not_shared_out_over_jobs() -> None:
    assert "launch.resources.parallel.jobs: unknown" in refused(*TINY, "launch.resources.parallel.jobs=2")
    told = "launch.resources.distill.jobs=2: this stage is not shared out; leave it out"
    assert told in refused(*TINY, "launch.resources.distill.jobs=2")


@pytest.mark.parametrize("trainer", ["trainer.devices=2", "trainer.devices=1"])
def test_a_stage_that_asks_a_teacher_is_shared_out_by_an_array_of_jobs(trainer: str, tmp_path: Path) -> None:
    found = needs("teacher=cached", "launch.resources.record.jobs=3", trainer)["record"]
    config = {"name": "x", "run_dir": str(tmp_path), "force": [], "launch": {}, "prepare_only": False}
    config |= {"resume": {"from_step": None}, "stages": {"record": {}}}
    run = planned(config, [{"stage": "record", "do": "start", "plan": {"needs": found}}], ["+experiment=x"])
    assert [job.name for job in run.jobs] == ["record.prepare", "record.share", "record"]
    [_, (share, text), (whole, other)] = scripts([run])
    assert share.needs == whole.needs
    assert "--array=1-3" in options(text)
    assert "--array" not in " ".join(options(other))
    assert "share=2/3" in run_script(text, tmp_path, SLURM_ARRAY_TASK_ID="2").stdout
    assert "share=" not in run_script(other, tmp_path).stdout
    told: list[dict[str, str]] = []
    waits = []
    for number, job in enumerate(run.jobs):
        waits.append(_waits_for(told, job, runs=1))
        told.append({"stage": job.stage, "part": job.part, "job": str(number)})
    # One of the array may fail; where the text was not prepared the stage is not begun either.
    assert waits == [[], ["afterok:0"], ["afterok:0", "afterany:1"]]
    with pytest.raises(
        Refusal, match=r"launch\.resources\.record\.jobs=3: the runs of a sweep are tasks of job arrays"
    ):
        scripts([run, run])


def test_without_sbatch_a_run_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    words = [word for word in TINY if word != "dry_run=true"]
    done = train(
        *words, f"run_dir={tmp_path}/run", PATH="/usr/bin:/bin" if not Path("/usr/bin/sbatch").exists() else ""
    )
    assert done.stderr.startswith("error: launch=slurm: there is no sbatch on the PATH")
    assert not (tmp_path / "run").exists()


def fake_slurm(folder: Path, *, fails_at: int = 99) -> Path:
    """An sbatch that counts, and fails at one call; squeue and scancel that keep their words."""
    (folder / "bin").mkdir()
    programs = {
        "sbatch": f"n=$(cat {folder}/n 2>/dev/null || echo 0); n=$((n + 1)); echo $n > {folder}/n\n"
        f'echo "$@" >> {folder}/sbatch.log\n'
        f'if [ $n = {fails_at} ]; then echo "sbatch: error: invalid partition" >&2; exit 1; fi; echo $((100 + n))',
        "squeue": f"cat {folder}/squeue 2>/dev/null",
        "scancel": f'echo "$@" >> {folder}/scancel.log',
        "scontrol": "exit 1",
        "sacct": "exit 1",
    }
    for name, text in programs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    return folder


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return fake_slurm(tmp_path)


SUBMIT = [word for word in TINY if word != "dry_run=true"]


@pytest.mark.slow
def test_jobs_are_chained_and_a_second_chain_is_refused_while_the_first_is_alive(slurm: Path) -> None:
    run_dir = slurm / "a run"
    done = train(*SUBMIT, f"run_dir='{run_dir}'", "stop=distill")
    assert done.returncode == 0, done.stderr
    assert f"python train.py cancel 'run_dir={run_dir}'" in done.stdout
    dependencies = [
        line.split("--dependency=")[1].split()[0] for line in (slurm / "sbatch.log").read_text().splitlines()
    ]
    assert dependencies == ["singleton", *(f"singleton,afterok:{number}" for number in (101, 102, 103))]
    assert "--kill-on-invalid-dep=yes" in (slurm / "sbatch.log").read_text()
    told = json.loads((run_dir / "jobs" / "submitted.json").read_text())["jobs"]
    assert [(each["stage"], each["part"], each["job"]) for each in told] == [
        ("pretrain", "prepare", "101"),
        ("pretrain", "run", "102"),
        ("distill", "prepare", "103"),
        ("distill", "run", "104"),
    ]
    assert subprocess.run(["bash", "-n", *(run_dir / "jobs").glob("*.sbatch")]).returncode == 0
    (slurm / "squeue").write_text("104|PENDING|Dependency\n101|RUNNING|None\n999|RUNNING|None\n")
    (run_dir / ".pretrain.partial").mkdir()  # what the job that runs is writing
    again = train(*SUBMIT, f"run_dir='{run_dir}'", "stop=distill")
    assert again.returncode == 2
    assert "its jobs 104, 101 are queued or running" in again.stderr
    assert (run_dir / ".pretrain.partial").exists()
    local = train(*(word for word in SUBMIT if word != "launch=slurm"), f"run_dir='{run_dir}'")
    assert "its jobs 104, 101 are queued or running" in local.stderr


def test_where_one_job_is_refused_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    fake_slurm(tmp_path, fails_at=3)
    run = one_job(tmp_path / "run", [])
    with pytest.raises(Refusal, match="distill: sbatch: error: invalid partition; nothing is submitted"):
        submit([Run(run.config, run.stages, run.jobs * 3)])
    assert (tmp_path / "scancel.log").read_text() == "101 102\n"
    assert not (tmp_path / "run" / "jobs" / "submitted.json").exists()


def submitted(run_dir: Path, *stages: str) -> None:
    """As if two jobs for each of these stages had been submitted, from 101 on."""
    (run_dir / "jobs").mkdir(parents=True)
    jobs = [(stage, part) for stage in stages for part in ("prepare", "run")]
    told = [{"stage": name, "part": part, "job": str(101 + at), "log": "x"} for at, (name, part) in enumerate(jobs)]
    artifact.write_json(run_dir / "jobs" / "submitted.json", {"jobs": told})
    artifact.write_json(run_dir / "config.json", {"order": [*stages, "evaluate"]})
    artifact.write_json(run_dir / run_folder.MARKER, {})
    run_folder.note_plan(run_dir, stages)


def finished(run_dir: Path, stage: str) -> None:
    def build(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"x")

    artifact.publish(
        run_dir / stage, build, {"stage": stage, "kind": "model", "parents": {}, "config": {}, "steps": 20}
    )


def test_status_tells_of_every_stage_by_files_and_by_slurm(slurm: Path) -> None:
    run_dir = slurm / "run"
    submitted(run_dir, "pretrain", "distill", "prune", "recover")
    finished(run_dir, "pretrain")
    work = run_dir / "work" / "distill"
    (work / "checkpoints").mkdir(parents=True)
    (work / "stage.json").write_text("{}")
    (work / "progress.json").write_text(json.dumps({"step": 7, "steps": 20, "loss": 3.25, "tokens_per_second": 1000.0}))
    (slurm / "squeue").write_text("104|RUNNING|None\n105|PENDING|Dependency\n106|PENDING|Priority\n")
    done = train("status", f"run_dir={run_dir}", "--json")
    rows = {row["stage"]: row for row in json.loads(done.stdout)["stages"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        "pretrain": "finished",
        "distill": "running",
        "prune": "waits",
        "recover": "to do",
    }
    assert (rows["pretrain"]["step"], rows["distill"]["step"], rows["distill"]["steps"]) == (20, 7, 20)
    assert (rows["distill"]["job"], rows["distill"]["slurm"], rows["distill"]["tokens_per_second"]) == (
        "104",
        "RUNNING",
        1000.0,
    )
    table = train("status", f"run_dir={run_dir}").stdout
    assert "7/20" in table
    assert "PENDING (Dependency)" in table
    (slurm / "squeue").write_text("104_2|PENDING|Priority\n104_1|RUNNING|None\n")  # an array of jobs
    assert submission.states(["104"]) == {"104": ("RUNNING", "None")}
    (slurm / "squeue").write_text("")
    error = {"stage": "distill", "rank": 3, "host": "n2", "where": "models/load.py:7 in f", "message": "no", "time": 1}
    (run_dir / "logs" / "distill" / "start-0").mkdir(parents=True)
    (run_dir / "logs" / "distill" / "start-0" / "error.json").write_text(json.dumps(error))
    table = train("status", f"run_dir={run_dir}").stdout
    assert "distill failed on rank 3 (n2), at models/load.py:7 in f: no" in table


def test_cancel_ends_what_waits_before_what_runs(slurm: Path) -> None:
    run_dir = slurm / "run"
    submitted(run_dir, "pretrain", "distill")
    (slurm / "squeue").write_text("102|RUNNING|None\n103|PENDING|Dependency\n104|PENDING|Dependency\n")
    done = train("cancel", f"run_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    assert (slurm / "scancel.log").read_text() == "103 104\n102\n"
    (slurm / "squeue").write_text("")
    assert "no job of it is queued or running" in train("cancel", f"run_dir={run_dir}").stderr


def test_a_list_of_jobs_that_says_something_else_is_refused(tmp_path: Path) -> None:
    submitted(tmp_path, "pretrain")
    artifact.write_json(tmp_path / "jobs" / "submitted.json", {"jobs": [{"stage": "pretrain"}]})
    with pytest.raises(Refusal, match="cannot be read; remove it"):
        submission.jobs_of(tmp_path)


@pytest.mark.parametrize(
    ("before", "made", "status", "told"),
    [
        ([], False, 1, "before it made anything to go on from"),
        ([], True, STOPPED, "the same command goes on"),
        ([5], False, 1, "before it got beyond step 5"),
    ],
)
def test_a_stage_that_gains_nothing_is_not_queued_again(
    tmp_path: Path, before: list[int], made: bool, status: int, told: str
) -> None:
    with pytest.raises(StageFailed, match=told) as failed:
        _end_early("evaluate", tmp_path, before, STOPPED, tmp_path, idle=not made)
    assert failed.value.code == status
    assert (tmp_path / "error.json").exists() == (status == 1)  # for the command `status`
    if status == 1:
        assert told in json.loads((tmp_path / "error.json").read_text())["message"]
    with pytest.raises(StageFailed, match="has made way" if made else "has made nothing since it was started"):
        _end_early("evaluate", tmp_path, before, TERMINATED, tmp_path, idle=not made)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["status"], "status: need run_dir=FOLDER"),
        (["cancel", "run_dir=x", "--json"], "need run_dir=FOLDER, nothing else"),
        (["status", "run_dir=/nowhere"], "run_dir=/nowhere: there is no run in it"),
    ],
)
def test_what_status_and_cancel_do_not_understand_is_refused(words: list[str], told: str) -> None:
    done = train(*words)
    assert done.returncode == 2
    assert told in done.stderr


@pytest.mark.slow  # three short runs; the jobs of tests/slurm do the same
def test_prepare_only_prepares_and_the_run_goes_on_from_there_to_the_same_weights(tmp_path: Path) -> None:
    words = [
        "+experiment=distill_7b_to_1b",
        "+scale=tiny",
        "logger=csv",
        "strategy=single",
        "trainer.devices=1",
        "only=[pretrain]",
    ]
    done = train(*words, "prepare_only=true", f"run_dir={tmp_path}/a")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "work" / "pretrain" / artifact.PREPARED).exists()
    assert not (tmp_path / "a" / "pretrain").exists()
    for name in "ab":
        assert train(*words, f"run_dir={tmp_path}/{name}").returncode == 0
    hashes = [artifact.read_manifest(tmp_path / name / "pretrain") for name in "ab"]
    assert len({found["files"]["model.safetensors"]["sha256"] for found in hashes if found}) == 1
    assert None not in hashes
