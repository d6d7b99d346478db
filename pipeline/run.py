"""Walk the stages: skip what is done, start what is not, write the report. Loads no torch."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from models.errors import Refusal, StageFailed
from pipeline import artifact, prefork
from pipeline.config import differences, fingerprint, selected
from pipeline.launch import die_with, environment
from pipeline.report.report import write_report
from pipeline.report.terminal import table

console = Console()


def run(config: dict[str, Any], typed: Mapping[str, Sequence[str]]) -> None:
    """`typed`: each choice on the command line, with the stages that take it."""
    run_dir = Path(config["run_dir"]).absolute()
    config = {**config, "run_dir": str(run_dir)} if config["run_dir"] == str(run_dir) else _rooted(config, run_dir)
    with prefork.server(config, selected(config)) as server:
        spec = {"config": config, "stages": selected(config), "typed": typed}
        _walk(config, run_dir, server, _check(spec, server))


def _walk(config: dict[str, Any], run_dir: Path, server: prefork.Server | None, answer: dict[str, Any]) -> None:
    plan = {entry["stage"]: entry for entry in answer["plan"]}
    if config["dry_run"] or config["show_data"]:
        _show(config, _jobs(config, plan))
        for line in answer["shown"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        asked = f"show_data={config['show_data']}" if config["show_data"] else "dry_run=true"
        console.print(f"{asked}: nothing was started", highlight=False)
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise Refusal(f"run_dir={run_dir}: {problem.strerror}; choose a folder that can be written to") from None
    with _alone(run_dir) as lock:
        artifact.sweep(run_dir)
        jobs = _jobs(config, plan)
        _show(config, jobs)
        artifact.write_json(run_dir / "config.json", config)
        for job in jobs:
            _run_stage(config, job, lock, server)
        report = write_report(run_dir)
    _print_whole(table(report))
    console.print(f"report: {run_dir / 'report.html'}", markup=False)


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
    if not console.is_terminal:  # where no spinner is seen, that it takes seconds is said
        console.print("checking")
        console.file.flush()
    with (
        tempfile.NamedTemporaryFile("w", suffix=".json") as file,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
        console.status("checking"),
    ):
        json.dump(spec, file)
        file.flush()
        arguments, env = ["check", file.name], environment(1, "auto")
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


def _jobs(config: dict[str, Any], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be done for each stage: start, resume, redo, skip; refuse what was made with other values."""
    jobs: list[dict[str, Any]] = []
    for name, entry in plan.items():
        told = entry["identity"]
        job = {"stage": name, "identity": told, "fingerprint": fingerprint(told), "plan": entry}
        busy = {other["stage"] for other in jobs if other["do"] != "skip"}
        jobs.append({**job, "do": _verdict(config, job, busy)})
    return jobs


def _verdict(config: dict[str, Any], job: dict[str, Any], busy: set[str]) -> str:
    """`busy`: the stages before this one that will not be skipped."""
    name, told, entry = job["stage"], job["identity"], job["plan"]
    run_dir = Path(config["run_dir"])
    finished = artifact.read_manifest(run_dir / name)
    started = _read(run_dir / "work" / name / "stage.json")
    if started and finished and started["attempt"] == finished["attempt"]:
        started = None  # killed after its result was in place
    same = started is not None and not differences(started["identity"], told)  # a new key that is null is no change
    if started and not same and not list((run_dir / "work" / name).glob("checkpoints/step-*.ckpt")):
        started = None  # refused or killed before it had learnt anything: nothing to protect
    if started is None and finished is None:
        return "start"
    made_here = {
        role
        for role, path in entry["parents"].items()
        if Path(path).parent == run_dir and Path(path).name in config["stages"]
    }
    stale = any(Path(entry["parents"][role]).name in busy for role in made_here)
    parents = {} if stale else _parents(config, entry)

    def other_parents(old: dict[str, Any]) -> set[str]:
        def hash_of(where: dict[str, Any], role: str) -> Any:
            return where.get(role, {}).get("content_hash")

        return {r for r in {*parents, *old["parents"]} if hash_of(parents, r) != hash_of(old["parents"], r)}

    # An attempt that was cut short goes on, whether it was begun by itself, by force or by resume=overwrite.
    if started and not stale and same and not other_parents(started):
        return "resume"
    if name in config["force"]:
        return "redo"
    old: dict[str, Any] = finished or started  # type: ignore[assignment]
    changed = differences(old["config"] if finished else old["identity"], told)
    others = set() if stale else other_parents(old)
    changed += [
        (f"parents.{role}", _short(old["parents"].get(role)), _short(parents.get(role)))
        for role in sorted(others - made_here)
    ]
    if changed and config["resume"] != "overwrite":
        raise Refusal(_differs(run_dir, name, changed))
    return "redo" if changed or stale or others else "skip"


def _parents(config: dict[str, Any], entry: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Role → path and content hash, of the models a stage reads and of its text."""
    cache = Path(config["run_dir"]) / "work" / "hashes.json"
    found = {}
    for role, path in entry["parents"].items():
        folder = Path(path)
        commit = entry["commits"].get(role)  # of a hub id; a changed repository is another parent
        content = artifact.content_hash(folder, cache) if folder.exists() else f"hub:{path}@{commit}"
        found[role] = {"path": path, "content_hash": content}
    if entry["content"]:
        found["data"] = {"path": ", ".join(entry["data"]["train"]["sources"]), "content_hash": entry["content"]}
    return found


def _run_stage(config: dict[str, Any], job: dict[str, Any], lock: int, server: prefork.Server | None) -> None:
    name, entry = job["stage"], job["plan"]
    run_dir = Path(config["run_dir"])
    work = run_dir / "work" / name
    if job["do"] == "skip":
        console.print(f"[dim]{name}: finished, skipped")
        return
    if job["do"] != "resume":
        shutil.rmtree(work, ignore_errors=True)
    before = _read(work / "stage.json") or {"restart": -1, "attempt": uuid.uuid4().hex}
    work.mkdir(parents=True, exist_ok=True)
    spec = work / "stage.json"
    artifact.write_json(
        spec,
        {
            "config": config,
            "stage": name,
            "parents": _parents(config, entry),
            "identity": job["identity"],
            "fingerprint": job["fingerprint"],
            "restart": before["restart"] + 1,
            "attempt": before["attempt"],
        },
    )
    launcher = instantiate(config["launch"])
    ranks, nodes = entry["ranks"], config["trainer"]["nodes"]
    begin = time.monotonic()
    modes = [("stage", 1)] if ranks == 1 else [("prepare", 1), ("run", ranks)]
    for mode, count in modes:
        env = environment(max(1, count // nodes), entry["device"])
        # The lock goes along: as long as any process of the stage lives, no other command may work here.
        if server is not None and count == 1 and launcher.on_this_machine:
            # Whoever saves a model asks whether it is DeepSpeed's (accelerate, extract_model_from_parallel).
            modules = ["deepspeed"] if entry["makes"] == "model" else []
            code = server.run([mode, str(spec)], env, [lock], modules=modules)
        else:
            command = launcher.command(["pipeline.worker", mode, str(spec)], ranks=count, nodes=nodes)
            parent = partial(die_with, os.getpid())
            code = subprocess.run(command, env=env, pass_fds=[lock], preexec_fn=parent).returncode
        if code == 2:  # refused, and told why
            raise StageFailed("", code)
        if code:
            where = f"{name} ({mode})" if len(modes) > 1 else name
            raise StageFailed(
                f"stage {where} failed with exit status {code}; run the same command again to go on from its last "
                f"checkpoint",
                code,
            )
    if artifact.read_manifest(run_dir / name) is None:
        raise StageFailed(f"stage {name} ended without its result {run_dir / name}", 1)
    shutil.rmtree(work)
    console.print(f"[green]{name}[/]: done in {time.monotonic() - begin:.0f} s")


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


def _differs(run_dir: Path, stage: str, changed: list[tuple[str, Any, Any]]) -> str:
    keys = "; ".join(f"{key}: {old!r} → {new!r}" for key, old, new in changed[:8])
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    return (
        f"{run_dir / stage} was made with other values ({keys}{more}); add resume=overwrite to redo it, choose another "
        f"run_dir=…, or give the old values"
    )


@contextmanager
def _alone(run_dir: Path) -> Iterator[int]:
    """Two commands in one run folder would overwrite each other's checkpoints."""
    with open(run_dir / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Refusal(
                f"run_dir={run_dir}: another command is working in it; wait for it or choose another run_dir"
            ) from None
        except OSError:
            pass  # some cluster file systems have no locks
        yield handle.fileno()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError):
        return None


def _short(parent: dict[str, str] | None) -> str | None:
    return None if parent is None else f"{parent['path']} {parent['content_hash'][:19]}"
