"""What has become of a run, from the files in its folder and from Slurm; and how to end it. Loads no torch.

python train.py status run_dir=R [--json]
python train.py cancel run_dir=R
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from models.errors import Refusal
from models.files import read_text
from models.training.saved import checkpoints, step_of
from pipeline import artifact, logs, run_folder, shared, submission

_FAILED = ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")  # ends of jobs


def command(words: Sequence[str]) -> None:
    """`status` or `cancel`, as typed."""
    name, *rest = words
    as_json = "--json" in rest and name == "status"
    rest = [word for word in rest if not (as_json and word == "--json")]
    if len(rest) != 1 or not re.match(r"run_dir=.", rest[0]):
        more = " and, if you like, --json" if name == "status" else ""
        quoted = (
            "; a folder with a space in its name needs quotes" if rest[:1] and rest[0].startswith("run_dir=") else ""
        )
        raise Refusal(f"{name} {' '.join(rest)}".rstrip() + f": need run_dir=FOLDER{more}, nothing else{quoted}")
    run_dir = Path(os.path.expanduser(rest[0].removeprefix("run_dir=").strip("'\"")))
    if not (run_dir / run_folder.MARKER).exists():
        below = sorted(str(path.parent) for path in run_dir.glob(f"*/{run_folder.MARKER}"))
        some = f", for example {below[0]}" if below else ""
        raise Refusal(
            f"run_dir={run_dir}: there is no run in it (no {run_folder.MARKER}); give the folder of one{some}"
        )
    if name == "cancel":
        _cancel(run_dir)
        return
    rows = status(run_dir)
    if as_json:
        print(json.dumps({"run_dir": str(run_dir.absolute()), "stages": rows}, indent=2))
    else:
        _show(run_dir, rows)


def status(run_dir: Path) -> list[dict[str, Any]]:
    """A row for each stage, in order.

    `state` is finished, running, queued, waits (for an earlier job), failed, stopped (unfinished, and nobody works on
    it), cancelled (with a job that it waited for, or by hand), damaged, or to do. Seconds since the last checkpoint,
    and those that are left by the pace so far; tokens of all ranks a second. `shares`: of a stage that jobs share out,
    how many are finished, and how many there are to be.
    """
    jobs: dict[str, list[dict[str, str]]] = {}
    told = submission.jobs_of(run_dir)
    for each in told:
        jobs.setdefault(each["stage"], []).append(each)
    alive = submission.states([each["job"] for each in told])
    busy = not alive and run_folder.busy(run_dir)  # a job works elsewhere, where its lock may not be seen
    rows = []
    for stage in _stages(run_dir, [*jobs]):
        row = _row(run_dir, stage, jobs.get(stage, []), alive, busy)
        busy = busy and row["state"] == "finished"  # a command walks the stages in order
        rows.append(row)
    return rows


def _stages(run_dir: Path, submitted: Sequence[str]) -> list[str]:
    """In the order of the run: those that the last plan had, and those that have left something."""
    try:
        config = json.loads(read_text(run_dir / "config.json"))
        order = [str(name) for name in config["order"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        order = []
    try:
        planned = set(json.loads(read_text(run_dir / run_folder.PLANNED))["stages"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        planned = set()
    left = {path.parent.name for path in run_dir.glob(f"*/{artifact.MANIFEST}")}
    left |= {path.parent.name for path in run_dir.glob("work/*/stage.json")} | {*submitted} | planned
    left |= {path.name for path in run_dir.glob("work/shares/*") if shared.folders(run_dir, path.name)}
    return [name for name in order if name in left] + sorted(left - {*order})


def _row(
    run_dir: Path,
    stage: str,
    jobs: Sequence[dict[str, str]],
    alive: dict[str, tuple[str, str]] | None,
    busy: bool,
) -> dict[str, Any]:
    work, found = run_dir / "work" / stage, artifact.look(run_dir / stage)
    error, shares = logs.last_error(run_dir, stage), shared.folders(run_dir, stage)
    for folder in shared.unfinished(run_dir, stage) if error is None else ():
        if (error := logs.last_error(folder, stage)) is not None:
            error["log"] = str(logs.starts(folder, stage)[-1])
            break
    progress = _progress(work)
    saved = checkpoints(work / "checkpoints")
    job = next((each for each in jobs if alive and each["job"] in alive), jobs[-1] if jobs else None)
    slurm = None if job is None else _slurm_state(job["job"], alive)
    begun = (work / "stage.json").exists()
    if found.state != "absent" and not begun:
        state = {"complete": "finished"}.get(found.state, "damaged")
    elif job is not None and alive and job["job"] in alive:
        pending = "waits" if alive[job["job"]][1].startswith("Dependency") else "queued"
        state = {"PENDING": pending, "SUSPENDED": "suspended"}.get(alive[job["job"]][0], "running")
    elif busy or any(map(run_folder.busy, shares)):
        state = "running"
    elif error or (slurm or "").startswith(_FAILED):
        state = "failed"
    elif begun or shares:
        state = "stopped"
    else:
        state = "cancelled" if (slurm or "").startswith("CANCELLED") else "to do"
    if state == "failed" and error is None:
        error = {"message": f"its job ended as {slurm}, and no rank has said why; see the log"}
    running = state in ("running", "suspended")
    if state == "finished":
        progress = {"step": (found.manifest or {}).get("steps")}
        progress["steps"] = progress["step"]
    return {
        "stage": stage,
        "state": state,
        "part": None if job is None or state == "finished" else job["part"],
        "shares": shared.finished(run_dir, stage),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "loss": progress.get("loss"),
        "tokens_per_second": progress.get("tokens_per_second") if running else None,
        "seconds_left": _left(progress) if running else None,
        "checkpoint": {"step": step_of(saved[-1]), "seconds": time.time() - saved[-1].stat().st_mtime}
        if saved
        else None,
        "starts": len(logs.starts(run_dir, stage)),
        "job": None if job is None else job["job"],
        "slurm": slurm,
        "log": None if job is None else job.get("log"),
        "error": error if state != "finished" and not running else None,
    }


def _progress(work: Path) -> dict[str, Any]:
    try:
        told = json.loads(read_text(work / "progress.json"))
        return told if isinstance(told, dict) else {}
    except (OSError, ValueError, RecursionError):
        return {}


def _left(progress: dict[str, Any]) -> float | None:
    left, at = progress.get("seconds_left"), progress.get("time")
    return None if left is None or at is None else max(0.0, left - (time.time() - at))


def _slurm_state(job: str, alive: dict[str, tuple[str, str]] | None) -> str | None:
    if alive is None:
        return "Slurm does not answer"
    if job in alive:
        state, reason = alive[job]
        return state if reason in ("None", "") or state == "RUNNING" else f"{state} ({reason})"
    for words in (
        ["scontrol", "show", "job", "--oneliner", job],
        ["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", f"--jobs={job}"],
    ):
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0 and done.stdout.strip():
            shown = re.search(r"JobState=(\S+)", done.stdout)
            return shown[1] if shown else done.stdout.split()[0]
    return "ended"  # Slurm has forgotten it


def _cancel(run_dir: Path) -> None:
    """End the jobs of a run that are queued or running: those that train save a checkpoint first, in the
    time that Slurm leaves between SIGTERM and SIGKILL (KillWait)."""
    console = Console()
    alive = submission.states([each["job"] for each in submission.jobs_of(run_dir)])
    if alive is None:
        raise Refusal(f"cancel run_dir={run_dir}: Slurm does not answer; try again, or use scancel")
    if not alive:
        other = "; a command on this machine works there: end it with Ctrl-C" if run_folder.busy(run_dir) else ""
        raise Refusal(f"cancel run_dir={run_dir}: no job of it is queued or running{other}")
    # Those that wait first: else the next would start when the running one ends.
    waiting = [job for job, (state, _) in alive.items() if state == "PENDING"]
    for jobs in (waiting, [job for job in alive if job not in waiting]):
        if jobs:
            done = subprocess.run(["scancel", *jobs], capture_output=True, text=True)
            if done.returncode:
                raise Refusal(f"cancel run_dir={run_dir}: {' '.join(done.stderr.split())}")
    console.print(
        f"cancelled {', '.join(alive)}; what was finished is whole, and the same command goes on", markup=False
    )


def _show(run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 1000
    shown = Table(title=str(run_dir), title_justify="left")
    slurm = any(row["job"] for row in rows)
    columns = ["stage", "state", "step", "loss", "tokens/s", "left", "checkpoint", "starts"] + ["job", "Slurm"] * slurm
    for column in columns:
        shown.add_column(
            column, justify="right" if column in ("step", "loss", "tokens/s", "left", "starts") else "left"
        )
    for row in rows:
        step = "" if row["step"] is None else f"{row['step']:,}"
        saved = row["checkpoint"]
        cells = [
            row["stage"],
            row["state"] + _told_of_part(row),
            f"{step}/{row['steps']:,}" if row["steps"] else step,
            "" if row["loss"] is None else f"{row['loss']:.3f}",
            "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}",
            "" if row["seconds_left"] is None else _time(row["seconds_left"]),
            "" if saved is None else f"step {saved['step']:,}, {_time(saved['seconds'])} ago",
            str(row["starts"] or ""),
        ]
        shown.add_row(*cells, *([row["job"] or "", row["slurm"] or ""] if slurm else []))
    console.print(shown)
    for row in rows:
        if (error := row["error"]) is not None:
            rank = "" if error.get("rank") is None else f" on rank {error['rank']} ({error.get('host')})"
            where = f", at {error['where']}" if error.get("where") else ""
            said = " ".join(str(error.get("message", "")).split())
            console.print(f"{row['stage']} failed{rank}{where}: {said}", markup=False, highlight=False, soft_wrap=True)
            if log := error.get("log") or row["log"]:
                console.print(f"  log: {log}", markup=False, highlight=False, soft_wrap=True)


def _told_of_part(row: dict[str, Any]) -> str:
    if row["shares"] is not None and row["state"] != "finished":
        done, of = row["shares"]
        return f" ({done} of {of} shares)"
    return " (prepares)" if row["part"] in ("prepare", "share") and row["state"] == "running" else ""


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
