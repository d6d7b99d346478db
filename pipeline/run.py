"""Walk the stages: skip what is done, start what is not, write the report. Loads no torch."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from hydra.utils import instantiate
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.errors import NOT_FINITE, STOPPED, TERMINATED, Refusal, StageFailed, of_storage
from pipeline import artifact, hashes, logs, prefork, run_folder, shared, submission
from pipeline.building import refusing
from pipeline.config import selected
from pipeline.launch import die_with, environment
from pipeline.notice import notice
from pipeline.report.report import write_report
from pipeline.report.terminal import table
from pipeline.tracked import closed
from pipeline.verdicts import BEGUN, after_not_finite, begun, checkpoints_of, jobs_of, parents_of, steps_of, turn_of

console = Console()
_NOTHING = "nothing was started"


def run(config: dict[str, Any], typed: Mapping[str, Sequence[str]], words: Sequence[str]) -> submission.Run | None:
    """`typed`: each choice on the command line, with the stages that take it; `words`: all of its settings. What is to
    be submitted, where the launcher does that."""
    run_dir = Path(config["run_dir"]).absolute()
    config = {**config, "run_dir": str(run_dir)} if config["run_dir"] == str(run_dir) else _rooted(config, run_dir)
    config = _on_nodes(config)
    if config["share"] is not None:
        config = _of_share(config)
        run_dir = Path(config["run_dir"])
    try:  # from here on something is written
        run_folder.check_ours(run_dir)
        with prefork.server(config, selected(config)) as server:
            spec = {"config": config, "stages": selected(config), "typed": typed}
            return _walk(config, words, server, _check(spec, server))
    except OSError as problem:
        if (line := of_storage(problem, run_dir)) is None:
            raise
        raise Refusal(line) from None


def _of_share(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a job that makes a share of a stage, in a folder of its own."""
    with refusing("launch"):
        submits = instantiate(config["launch"]).submits
    if submits:
        raise Refusal(
            f"share={config['share']}: with launch=slurm such jobs are submitted by launch.resources.STAGE.jobs=N; "
            f"leave share out"
        )
    if "SLURM_JOB_ID" not in os.environ:
        submission.refuse_busy(Path(config["run_dir"]))
    return shared.alone(config)


def _forecast(config: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from pipeline.forecast.shown import lines, table

    if config["forecast"]["json"]:
        print(json.dumps({"forecast": config["forecast"], "stages": rows}))
        return
    _print_whole(table(config, rows))
    for line in lines(config, rows):
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)
    console.print(f"forecast=true: {_NOTHING}", highlight=False)


def _walk(
    config: dict[str, Any], words: Sequence[str], server: prefork.Server | None, answer: dict[str, Any]
) -> submission.Run | None:
    if config["forecast"]["show"]:
        _forecast(config, answer["forecast"])
        return None
    plan = {entry["stage"]: entry for entry in answer["plan"]}
    run_dir, submits = Path(config["run_dir"]), instantiate(config["launch"]).submits
    asked = next((f"{key}={config[key]}" for key in ("prepare_data", "show_data") if config[key]), "")
    if config["dry_run"] or asked:
        jobs = jobs_of(config, plan)
        _show(config, jobs)
        for line in answer["shown"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if submits and not asked:
            return submission.planned(config, jobs, words)
        ended = "no stage was started; the run itself makes what is missing" if config["prepare_data"] else _NOTHING
        console.print(f"{asked or 'dry_run=true'}: {ended}", highlight=False)
        return None
    if config["doctor"]:
        from pipeline.doctor.walk import examine

        examine(config, plan, console)
        return None
    if submits:
        submission.refuse_busy(run_dir)  # before anything is touched that a job may be writing
        with run_folder.claimed(run_dir):
            jobs = jobs_of(config, plan)
            _show(config, jobs)
            return submission.planned(config, jobs, words)
    if "SLURM_JOB_ID" not in os.environ:  # a job is where the run's jobs are
        submission.refuse_busy(run_dir)
    if config["share"] is not None:
        shared.begin(run_dir)
    with run_folder.claimed(run_dir) as lock:
        artifact.sweep(run_dir, config["stages"])
        hashes.add(run_folder.hashes(run_dir), answer["hashes"])
        jobs = jobs_of(config, plan)
        _show(config, jobs)
        artifact.write_json(run_dir / "config.json", config)
        if config["only"] is None or not (run_dir / run_folder.PLANNED).exists():
            run_folder.note_plan(run_dir, [*plan])
        for job in jobs:
            if job["do"] != "skip":
                shared.refuse_busy(run_dir, job["stage"])  # all of them before hours go by
        for job in jobs:
            _run_stage(config, job, lock, server)
        if config["share"] is not None:
            told = f"share={config['share']}: finished; {jobs[0]['stage']} takes it over, when it runs without share"
            console.print(told, highlight=False, soft_wrap=True)
        if config["prepare_only"] or config["share"] is not None:
            return None
        report = write_report(run_dir)
        if any(job["do"] != "skip" for job in jobs) or not (run_dir / "logs" / "report").exists():
            closed(config, report)
    _print_whole(table(report))
    console.print(f"report: {run_dir / 'report.html'}", markup=False)
    required = config["verdict"]["require"]
    if required is not None and any(entry["makes"] == "results" for entry in plan.values()):
        short = [each for each in report["verdicts"] if each["verdict"] not in (required, "better")]
        if short:
            told = "; ".join(each["sentence"] for each in short)
            raise StageFailed(f"verdict.require={required} does not hold: {told}", 3)
    return None


def submit(runs: Sequence[submission.Run]) -> None:
    """Submit what `run` has returned, of a sweep together; or show the scripts, where that was asked for."""
    runs = [each for each in runs if each.jobs] or [*runs]
    if not runs[0].jobs:
        console.print("everything is finished, nothing was submitted; the report is report.html in the run folder")
        return
    folders = ", ".join(str(each.folder) for each in runs)
    if runs[0].config["dry_run"]:
        for job, text in submission.scripts(runs):
            console.print(f"# ----- {job.name}.sbatch", markup=False, highlight=False)
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        console.print("dry_run=true: nothing was submitted", highlight=False)
        return
    shown = Table(title=escape(f"submitted for {folders}"), title_justify="left")
    for column in ("stage", "job", "asks for", "log"):
        shown.add_column(column)
    for each in submission.submit(runs):
        name = each["stage"] if each["part"] == "run" else f"{each['stage']}.{each['part']}"
        shown.add_row(name, each["job"], each["needs"], escape(each["log"]))
    _print_whole(shown)
    for submitted in runs:
        folder = shlex.quote(f"run_dir={submitted.folder}")
        for told in (
            f"look:   python train.py status {folder}",
            f"cancel: python train.py cancel {folder}",
        ):
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _on_nodes(config: dict[str, Any]) -> dict[str, Any]:
    """With as many nodes as the launcher makes use of; what is wrong with the values is left to the check."""
    trainer = config["trainer"]
    training = [config["stages"][name].get("training") or {} for name in selected(config)]
    shares = [(each.get("global_batch"), each.get("micro_batch")) for each in training if "global_batch" in each]
    with refusing("launch"):
        nodes = instantiate(config["launch"]).nodes(trainer["nodes"], trainer["devices"], shares)
    if nodes == trainer["nodes"]:
        return config
    console.print(f"{nodes} of {trainer['nodes']} nodes are used: those can share out the micro-batches of every step")
    return {**config, "trainer": {**trainer, "nodes": nodes}}


def _rooted(config: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Every mention of the run folder made absolute: stages may run elsewhere."""
    old = config["run_dir"].rstrip("/")

    def move(node: Any) -> Any:
        if isinstance(node, dict):
            return {k: move(v) for k, v in node.items()}
        if isinstance(node, list):
            return [move(v) for v in node]
        if isinstance(node, str) and (node == old or node.startswith(old + "/")):
            return str(run_dir) + node[len(old) :]
        return node

    moved: dict[str, Any] = move(config)
    return {**moved, "run_dir": str(run_dir)}


def _check(spec: dict[str, Any], server: prefork.Server | None) -> dict[str, Any]:
    """All that can be refused is refused by one process, before the first stage starts."""
    if (
        not console.is_terminal and not spec["config"]["forecast"]["json"]
    ):  # where no spinner is seen, that it takes seconds is said
        console.print("checking")
        console.file.flush()
    with (
        run_folder.scratch() as scratch,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        console.status("checking"),
    ):
        artifact.write_json(scratch / "spec.json", spec)
        arguments, env = ["check", str(scratch / "spec.json")], environment(1, "auto")
        if server is not None:
            code = server.run(arguments, env, [out.fileno(), err.fileno()], output=True)
        else:
            command = [sys.executable, "-m", "pipeline.worker", *arguments]
            code = subprocess.run(command, env=env, stdout=out, stderr=err).returncode
        out.seek(0)
        err.seek(0)
        lines, errors = out.read().strip().splitlines(), err.read().strip()
    answer = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    if answer is None:
        raise StageFailed(f"the check of the configuration broke off:\n{errors[-4000:]}", code or 1)
    if "refusal" in answer:
        raise Refusal(answer["refusal"])
    found: dict[str, Any] = answer
    return found


def _run_stage(config: dict[str, Any], job: dict[str, Any], lock: int, server: prefork.Server | None) -> None:
    name, entry = job["stage"], job["plan"]
    run_dir = Path(config["run_dir"])
    work = run_dir / "work" / name
    if job["do"] == "skip":
        if begun(work) is not None:  # killed between its result and the removal of what that was made of
            run_folder.clear(run_dir, name)
        shared.clear(run_dir, name)
        console.print(f"[dim]{name}: finished, skipped")
        return
    shared.refuse_busy(run_dir, name)
    if config["prepare_only"] and (waits := _still_to_make(run_dir, entry)):
        console.print(f"{name}: not prepared, as it reads what {waits} still has to make")
        return
    if job["do"] not in ("resume", "turn"):
        run_folder.clear(run_dir, name)
    before = begun(work) or {"restart": -1, "attempt": uuid.uuid4().hex}
    turns = before.get("turns", [])
    if (turn := turn_of(config, before, job["identity"]) if job["do"] == "turn" else None) is not None:
        turns = [*turns, turn]
        for step, later in checkpoints_of(work).items():
            if step > turn["step"]:  # of the way that was left; first, since who is begun goes on from the newest
                console.print(f"{name}: back to step {turn['step']}, the checkpoint of step {step} is removed")
                shutil.rmtree(later)
    work.mkdir(parents=True, exist_ok=True)
    spec = work / BEGUN
    told = {
        "config": config,
        "stage": name,
        "parents": parents_of(config, entry),
        "identity": job["identity"],
        "fingerprint": job["fingerprint"],
        "restart": before["restart"] + 1,
        "attempt": before["attempt"],
        "turns": turns,
    }
    artifact.write_json(spec, artifact.with_hash(told))
    launcher = instantiate(config["launch"])
    kept, ended = logs.next_start(run_dir, name), work / "ranks" / "ended.json"
    ended.unlink(missing_ok=True)
    ranks, nodes = entry["ranks"], config["trainer"]["nodes"]
    begin, steps, made = time.monotonic(), steps_of(work), _made_so_far(config, work)
    modes = [("stage", 1)] if ranks == 1 else [("prepare", 1), ("run", ranks)]
    if config["prepare_only"]:
        modes = [("prepare", 1)]
    for mode, count in modes:
        env = environment(max(1, count // nodes), entry["device"]) | launcher.variables | {logs.VARIABLE: str(kept)}
        # The lock goes along: as long as any process of the stage lives, no other command may work here.
        if server is not None and count == 1 and launcher.on_this_machine:
            # Whoever saves a model asks whether it is DeepSpeed's (accelerate, extract_model_from_parallel).
            modules = ["deepspeed"] if entry["makes"] == "model" else []
            code = server.run([mode, str(spec)], env, [lock], modules=modules)
        else:
            command = launcher.command(["pipeline.worker", mode, str(spec)], ranks=count, nodes=nodes)
            code = _told_of_notice(command, env, lock)
        if code and code not in (STOPPED, TERMINATED):
            logs.collect(kept, name, code, ended)
        if code == 2:  # refused, and told why
            raise StageFailed("", code)
        if code in (STOPPED, TERMINATED):
            _end_early(name, work, steps, code, kept, idle=_made_so_far(config, work) == made)
        if code:
            where = f"{name} ({mode})" if len(modes) > 1 else name
            way_on = "run the same command again to go on from its last checkpoint"
            if code == NOT_FINITE:
                way_on = after_not_finite(config, name)
            raise StageFailed(f"stage {where} failed with exit status {code}; {way_on}", code)
    if config["prepare_only"]:
        console.print(f"[green]{name}[/]: prepared in {time.monotonic() - begin:.0f} s")
        return
    if artifact.read_manifest(run_dir / name) is None:
        raise StageFailed(f"stage {name} ended without its result {run_dir / name}", 1)
    run_folder.clear(run_dir, name)
    shared.clear(run_dir, name)
    console.print(f"[green]{name}[/]: done in {time.monotonic() - begin:.0f} s")


def _still_to_make(run_dir: Path, entry: dict[str, Any]) -> str:
    """The stage of this run whose artifact another one reads, and which has not made it; "" where there is none."""
    folders = [Path(path) for path in entry["parents"].values() if Path(path).parent == run_dir]
    return next((each.name for each in folders if artifact.read_manifest(each) is None), "")


def _told_of_notice(command: list[str], env: dict[str, str], lock: int) -> int:
    """Run a launcher's command, and hand on to it what notice is given of the job's end: srun hands it on to the ranks.
    Its exit status. Where a stage has finished all the same, the next is not begun."""
    child = subprocess.Popen(command, env=env, pass_fds=[lock], preexec_fn=partial(die_with, os.getpid()))
    notice.heed(child.send_signal)
    if (code := child.wait()) == 0:
        notice.unheed()
    return code


def _made_so_far(config: dict[str, Any], work: Path) -> set[tuple[str, int]]:
    """What a next start of a stage would go on from: files and their sizes, without those that every start writes."""
    own = {BEGUN, "progress.json", artifact.METRICS}
    shelves = [work.parent / kind / work.name for kind in (run_folder.SIGNALS, run_folder.ANSWERS)]
    folders = [work, shared.root(config) / "work" / "data", *shelves]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.name not in own and path.parent != work / "ranks" and path.name[0] != "."]
    found = set()
    for path in kept:
        with suppress(FileNotFoundError):  # other jobs prepare text, too
            found.add((str(path), path.stat().st_size))
    return found


def _end_early(stage: str, work: Path, before: list[int], code: int, kept: Path, *, idle: bool) -> NoReturn:
    """Of a stage that notice was given to. `before`: the steps of its checkpoints when it was started; `kept`: the logs
    of this start; `idle`: it has made nothing since. A job that gains nothing would be queued again for ever."""
    if code == STOPPED and (idle or (before and steps_of(work)[-1:] <= before[-1:])):
        got = f"got beyond step {before[-1]}, where it was started" if before else "made anything to go on from"
        more = ", or save more often (trainer.checkpoint.every_steps)" if before else ""
        told = f"was stopped before it {got}; give the job a longer time limit{more}"
        logs.tell({"stage": stage, "rank": None, "status": 1, "where": None, "message": told}, "error.json", str(kept))
        raise StageFailed(f"stage {stage} {told}", 1)
    why = "notice was given that the job ends" if code == STOPPED else "it was asked to end (SIGTERM)"
    told = "has made nothing since it was started" if idle else "has made way"
    raise StageFailed(f"stage {stage} {told}: {why}; the same command goes on", code)


def _show(config: dict[str, Any], jobs: list[dict[str, Any]]) -> None:
    plan = Table(title=escape(f"{config['name']} → {config['run_dir']}"), title_justify="left")
    for column in ("stage", "", "model", "parameters", "teacher", "until", "ranks"):
        plan.add_column(column, justify="right" if column in ("parameters", "ranks") else "left")
    for job in jobs:
        entry = job["plan"]
        size = f"{entry['parameters']:,}" if entry["parameters"] else ""
        plan.add_row(
            job["stage"],
            job["do"],
            entry["model"],
            size,
            escape(entry["teacher"]),
            entry["until"],
            f"{entry['ranks']} × {entry['device']}",
        )
    _print_whole(plan)
    for job in jobs:
        for warning in job["plan"]["warnings"]:
            told = f"[yellow]warning[/]: {job['stage']}: {escape(warning)}"
            console.print(told, soft_wrap=not console.is_terminal)


def _print_whole(shown: Table) -> None:
    """In a pipe or a log, which have no width, as wide as no cell is cut."""
    if not console.is_terminal:
        most = console.measure(shown, options=console.options.update(width=10_000)).maximum
        console.width = max(console.width, most)
    console.print(shown)
