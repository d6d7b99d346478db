"""Submit a run to Slurm: a job for each stage, each waiting for the one before it. Loads no torch.

What was submitted stands in `<run_dir>/jobs`: the scripts, and submitted.json with the jobs' numbers.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.files import read_text, write_text
from pipeline import artifact, run_folder
from pipeline.launch import ROOT
from pipeline.resources import NOTICE_SECONDS, Resources

FOLDER = "jobs"
_SUBMITTED = "submitted.json"
_SBATCH = Path(ROOT) / "slurm" / "train.sbatch"
_BODY = "set -euo pipefail\n"  # of that script from here on
# what a job has of its own, and words that concern this command alone
_DROPPED = (
    *("run_dir", "only", "start", "stop", "force", "dry_run", "show_data", "prepare_only", "prepare_data", "share"),
    *("trainer.nodes", "trainer.devices", "resume.from_step", "resume.skip_sequences"),
)


@dataclass(frozen=True)
class Job:
    stage: str
    part: str  # run; prepare: what one process does before the ranks of `run`; share: a part, of the text or the stage
    needs: Resources
    words: list[str]  # of train.py
    counted: str = ""  # of a share: the word that says which

    @property
    def tasks(self) -> int:
        return self.needs.jobs if self.counted else 1

    @property
    def name(self) -> str:
        return self.stage if self.part == "run" else f"{self.stage}.{self.part}"


@dataclass(frozen=True)
class Run:
    """A run folder that is to be filled by jobs."""

    config: dict[str, Any]
    stages: list[str]  # of the plan, finished ones too
    jobs: list[Job]

    @property
    def folder(self) -> Path:
        return Path(self.config["run_dir"])


def planned(config: dict[str, Any], verdicts: Sequence[dict[str, Any]], words: Sequence[str]) -> Run:
    """The jobs of the stages that are not finished. `verdicts`: of pipeline/verdicts.py; `words`: of the command
    line."""
    kept = [word for word in words if word.lstrip("+").partition("=")[0] not in _DROPPED]
    own = [f"run_dir={_quoted(config['run_dir'])}"]
    resume = config["resume"]
    jobs = []
    for verdict in verdicts:
        if verdict["do"] == "skip":
            continue
        name, needs = verdict["stage"], verdict["plan"]["needs"]
        said = [*kept, *own, f"only=[{name}]"]
        if name in config["force"]:
            said.append(f"force=[{name}]")
        if resume["from_step"] is not None and verdict["do"] in ("turn", "resume"):
            said += [f"resume.from_step={resume['from_step']}", f"resume.skip_sequences={resume['skip_sequences']}"]
        run = Resources(**needs["run"])
        if needs["prepare"] is not None:
            ranks = [f"trainer.nodes={run.nodes}", f"trainer.devices={run.ranks_per_node}"]
            before = Resources(**needs["prepare"])
            if before.jobs > 1 and "training" in config["stages"][name]:
                jobs.append(Job(name, "share", before, said, "prepare_data"))
            jobs.append(Job(name, "prepare", before, [*said, *ranks, "prepare_only=true"]))
        if not config["prepare_only"]:
            if run.jobs > 1:
                jobs.append(Job(name, "share", run, said, "share"))
            jobs.append(Job(name, "run", run, said))
    return Run(config, [each["stage"] for each in verdicts], jobs)


def scripts(runs: Sequence[Run]) -> list[tuple[Job, str]]:
    """The job scripts of one run, or of a sweep: then each is a job array with a task for every run. Raises Refusal for
    a sweep whose runs do not have the same jobs."""
    if len(runs) > 1:  # an array of arrays there is none: in a sweep one job prepares all of its run
        if shared := [job for run in runs for job in run.jobs if job.counted == "share"]:
            raise Refusal(
                f"launch.resources.{shared[0].stage}.jobs={shared[0].tasks}: the runs of a sweep are tasks of job "
                f"arrays already; leave it out, or submit the runs one by one, without -m"
            )
        runs = [replace(run, jobs=[job for job in run.jobs if job.part != "share"]) for run in runs]
    first = runs[0]
    for run in runs:
        if len([other for other in runs if other.folder == run.folder]) > 1:
            raise Refusal(
                f"run_dir={run.folder}: two runs of this sweep have the same folder; leave run_dir out, or name in it "
                f"what differs, as 'run_dir=runs/${{optimizer.lr}}'"
            )
    shapes = [[(job.name, job.needs) for job in run.jobs] for run in runs]
    for run, shape in zip(runs, shapes, strict=True):
        if shape != shapes[0] or run.config["launch"] != first.config["launch"]:
            raise Refusal(
                f"launch=slurm: the runs of a sweep are tasks of job arrays, and {run.folder} needs other jobs than "
                f"{first.folder} (finished stages count); submit them one by one, without -m"
            )
    return [(job, _script(runs, at)) for at, job in enumerate(first.jobs)]


def submit(runs: Sequence[Run]) -> list[dict[str, str]]:
    """Submit one run, or a sweep; the jobs, run by run. Either all are submitted, or none is left."""
    made = scripts(runs)
    for run in runs:
        refuse_busy(run.folder)
        with run_folder.claimed(run.folder):
            (run.folder / FOLDER).mkdir(exist_ok=True)
            for job in run.jobs:
                (run.folder / "logs" / job.stage).mkdir(parents=True, exist_ok=True)
            artifact.write_json(run.folder / "config.json", run.config)
            run_folder.note_plan(run.folder, run.stages)
    told: list[dict[str, str]] = []
    submitted: list[dict[str, str]] = []
    try:
        for job, text in made:
            path = runs[0].folder / FOLDER / f"{job.name}.sbatch"
            write_text(path, text)
            number = _sbatch(path, _waits_for(told, job, runs=len(runs)), alone=len(runs) == job.tasks == 1)
            told.append({"stage": job.stage, "part": job.part, "job": number, "needs": job.needs.told})
    except BaseException:
        if told:
            subprocess.run(["scancel", *(each["job"] for each in told)], capture_output=True)
        raise
    for at, run in enumerate(runs):
        own = [{**each, "job": f"{each['job']}_{at}" if len(runs) > 1 else each["job"]} for each in told]
        for each, (job, _) in zip(own, made, strict=True):
            each["log"] = str(_log(run.folder, each["stage"], each["job"] + ("_*" if job.tasks > 1 else "")))
        submitted += own
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        artifact.write_json(run.folder / FOLDER / _SUBMITTED, {"submitted": now, "jobs": own})
    return submitted


def jobs_of(run_dir: Path) -> list[dict[str, str]]:
    """The jobs that were submitted last for this run folder, in order; none where none was."""
    try:
        found: list[dict[str, str]] = json.loads(read_text(run_dir / FOLDER / _SUBMITTED))["jobs"]
        if not all(isinstance(each[key], str) for each in found for key in ("stage", "part", "job")):
            raise TypeError
        return found
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise Refusal(f"{run_dir / FOLDER / _SUBMITTED} cannot be read; remove it, and look with squeue") from None


def states(jobs: Sequence[str]) -> dict[str, tuple[str, str]] | None:
    """Of those jobs that Slurm still has, their state and the reason for it; None where Slurm does not answer."""
    if not jobs:
        return {}
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode:
        return None
    found: dict[str, tuple[str, str]] = {}
    for line in done.stdout.splitlines():
        number, state, reason = line.strip().split("|", 2)
        array = number.partition("_")[0]
        for each in (number, array) if array in jobs else (number,):
            if each in jobs and found.get(each, ("",))[0] != "RUNNING":  # of an array one task that runs
                found[each] = state, reason
    return found


def refuse_busy(run_dir: Path) -> None:
    """While jobs of a run folder are alive."""
    if alive := states([each["job"] for each in jobs_of(run_dir)]):
        folder = shlex.quote(f"run_dir={run_dir}")
        raise Refusal(
            f"run_dir={run_dir}: its jobs {', '.join(alive)} are queued or running; look with `python train.py status "
            f"{folder}`, or end them with `python train.py cancel {folder}` first"
        )


def _waits_for(told: Sequence[dict[str, str]], job: Job, *, runs: int) -> list[str]:
    """What a job depends on, of those before it. Of a stage that jobs share out the stage itself makes what one of them
    has not; but it waits for what they waited for, too: where that failed none of them has begun."""
    after = "aftercorr" if runs > 1 else "afterok"
    if not told:
        return []
    if (told[-1]["stage"], told[-1]["part"], job.part) != (job.stage, "share", "run"):
        return [f"{after}:{told[-1]['job']}"]
    return [f"{after}:{each['job']}" for each in told[-2:-1]] + [f"afterany:{told[-1]['job']}"]


def _sbatch(path: Path, waits_for: Sequence[str], *, alone: bool) -> str:
    words = ["sbatch", "--parsable", "--kill-on-invalid-dep=yes"]
    # One job of a run folder at a time, whoever submitted it; but the tasks of an array are named alike.
    waits = [*(["singleton"] if alone else []), *waits_for]
    if waits:
        words.append(f"--dependency={','.join(waits)}")
    done = subprocess.run([*words, str(path)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line] or [f"exit status {done.returncode}"]
        raise Refusal(f"{path.stem}: {'; '.join(lines)}; nothing is submitted; its script is {path}")
    return done.stdout.strip().partition(";")[0]


def _script(runs: Sequence[Run], at: int) -> str:
    first, job = runs[0], runs[0].jobs[at]
    launch = first.config["launch"]
    site, place = launch.get("site") or {}, str(first.folder.absolute())
    name = f"retort-{first.config['name']}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    elastic = bool(launch.get("elastic")) and job.needs.nodes > 1
    number = "%A_%a" if job.tasks > 1 else "%j"
    output = (
        _log(first.folder, job.stage, number) if len(runs) == 1 else first.folder / FOLDER / f"{job.name}-%A_%a.log"
    )
    options = [
        f"--job-name={name}",
        f"--comment=retort:{job.name}",
        f"--output={str(output.parent).replace('%', '%%')}/{output.name}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{NOTICE_SECONDS}",
        *([f"--array=0-{len(runs) - 1}"] if len(runs) > 1 else []),
        *([f"--array=1-{job.tasks}"] if job.tasks > 1 else []),
        *([f"--account={site['account']}"] if site.get("account") else []),
        *([f"--partition={site['partition']}"] if site.get("partition") else []),
        *(site.get("options") or []),
        *job.needs.words(elastic=elastic),
    ]
    head = "".join(f"#SBATCH {_for_sbatch(option)}\n" for option in options)
    setup = "".join(f"{line}\n" for line in site.get("setup") or [])
    if elastic:  # before 22.05 srun takes its own from that variable
        setup += f"export RETORT_RANKS_PER_NODE={job.needs.ranks_per_node}\nunset SLURM_CPUS_PER_TASK\n"
    text = _SBATCH.read_text(encoding="utf-8")
    return (
        f"#!/bin/bash\n{head}\n# {job.name} of {place}\n{setup}"
        f"export RETORT_CHECKOUT={shlex.quote(ROOT)} RETORT_PYTHON=${{RETORT_PYTHON:-{shlex.quote(sys.executable)}}}\n"
        f"{_words(runs, at)}\n{text[text.index(_BODY) :]}"
    )


def _words(runs: Sequence[Run], at: int) -> str:
    """Lines of bash that set the words of train.py: of a sweep those of the array's task, whose log is then its
    run's."""
    if len(runs) == 1:
        job = runs[0].jobs[at]
        share = f' "{job.counted}=$SLURM_ARRAY_TASK_ID/{job.tasks}"' if job.tasks > 1 else ""
        return f"set -- {shlex.join(job.words)}{share}\n"
    lines = ["case $SLURM_ARRAY_TASK_ID in"]
    for task, run in enumerate(runs):
        job = run.jobs[at]
        log = str(_log(run.folder.absolute(), job.stage, "JOB")).removesuffix("JOB.log")
        number = '"$SLURM_ARRAY_JOB_ID"_' + str(task)
        lines.append(f"{task}) exec >> {shlex.quote(log)}{number}.log 2>&1; set -- {shlex.join(job.words)} ;;")
    return "\n".join([*lines, "esac", ""])


def _log(run_dir: Path, stage: str, number: str) -> Path:
    return run_dir / "logs" / stage / f"job-{number}.log"


def _for_sbatch(option: str) -> str:
    """sbatch splits its lines at spaces, and takes quotes."""
    return f'"{option}"' if any(each.isspace() for each in option) else option


def _quoted(value: str) -> str:
    """A text as Hydra's grammar takes it."""
    if re.fullmatch(r"[\w./-]+", value):
        return value
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
