"""doctor=true: the stages that train are run for two steps on some of their text, and looked at from inside.

In `<run_dir>/.doctor.partial`, which is removed. What stays is `<run_dir>/doctor.json`, the marker and the lock of the
run folder. Loads no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from rich.console import Console

from models.errors import Refusal
from models.files import remove
from pipeline import artifact, run_folder
from pipeline.doctor.findings import Finding, finding, skipped, table
from pipeline.launch import die_with, environment
from pipeline.verdicts import parents_of

FOLDER, FINDINGS = ".doctor.partial", "doctor.json"  # such folders are Retort's own, whatever they hold
_ALL = "all"  # the check that stands for all of a stage that cannot be looked at yet
_FILES = ("findings-of-text.json", "findings.json")


def examine(config: dict[str, Any], plan: dict[str, dict[str, Any]], console: Console) -> None:
    """Raises Refusal where a check failed."""
    run_dir = Path(config["run_dir"])
    if not any("training" in config["stages"][name] for name in plan):
        raise Refusal(f"doctor=true: none of {', '.join(plan)} trains; leave it out")
    if instantiate(config["launch"]).submits:
        raise Refusal(
            "doctor=true, launch=slurm: this is no Slurm allocation, and its ranks would have no nodes; call it inside "
            "`salloc`, or submit it with `sbatch slurm/train.sbatch … doctor=true`"
        )
    with run_folder.claimed(run_dir) as lock:
        scratch = run_dir / FOLDER
        remove(scratch)
        found: list[tuple[str, Finding]] = []
        try:
            for name, entry in plan.items():
                if "training" in config["stages"][name]:
                    console.print(f"doctor: {name}", highlight=False)
                    found += [(name, each) for each in _examined(config, entry, scratch, lock)]
        finally:
            remove(scratch)
        told = [{"stage": stage, **each.as_json()} for stage, each in found]
        artifact.write_json(run_dir / FINDINGS, {"found": told})
    if not console.is_terminal:
        console.width = max(console.width, 200)
    console.print(table(found))
    failed = [f"{stage}: {each.check}" for stage, each in found if each.verdict == "failed"]
    if failed:
        raise Refusal(f"doctor: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}; see the table")
    ran = [each for _, each in found if each.verdict != "skipped"]
    if not ran:
        stages = ", ".join(dict.fromkeys(stage for stage, _ in found))
        raise Refusal(
            f"doctor: nothing was checked: {found[0][1].measured}; run the stages before {stages} first, or leave out "
            f"doctor=true"
        )
    warned = sum(each.verdict == "warning" for each in ran)
    said = "nothing was found" if not warned else f"{warned} of {len(ran)} checks warn; see the table"
    console.print(f"doctor: {said}{_left_out(found)}", highlight=False)


def _left_out(found: list[tuple[str, Finding]]) -> str:
    """What was not looked at, for the last line."""
    stages = [stage for stage, each in found if each.verdict == "skipped" and each.check == _ALL]
    number = sum(each.verdict == "skipped" and each.check != _ALL for _, each in found)
    told = [f"{number} of {len(found) - len(stages)} checks were skipped"] if number else []
    told += [f"nothing of {', '.join(stages)} was checked"] if stages else []
    return "".join(f"; {each}" for each in told)


def _examined(config: dict[str, Any], entry: dict[str, Any], scratch: Path, lock: int) -> list[Finding]:
    name, run_dir = entry["stage"], Path(config["run_dir"])
    for path in entry["parents"].values():
        made = Path(path)
        if made.parent == run_dir and made.name in config["stages"] and artifact.read_manifest(made) is None:
            return [skipped(_ALL, f"it reads what the stage {made.name} is still to make; ask again once that is done")]
    work = scratch / "work" / name
    work.mkdir(parents=True)
    spec = work / "stage.json"
    told = {
        "config": _config_of(config, scratch, entry["data"]),
        "stage": name,
        "parents": parents_of({**config, "run_dir": str(scratch), "force": []}, entry),
        "identity": entry["identity"],
        "restart": 0,
        "attempt": os.urandom(16).hex(),
    }
    artifact.write_json(spec, artifact.with_hash(told))
    launcher, nodes = instantiate(config["launch"]), config["trainer"]["nodes"]
    ranks = entry["ranks"]
    for mode, count in [("stage", 1)] if ranks == 1 else [("prepare", 1), ("run", ranks)]:
        command = launcher.command(["pipeline.worker", mode, str(spec)], ranks=count, nodes=nodes)
        env = environment(max(1, count // nodes), entry["device"]) | launcher.variables
        child = subprocess.Popen(command, env=env, pass_fds=[lock], preexec_fn=partial(die_with, os.getpid()))
        if code := child.wait():
            return [
                *_found(work),
                finding("two steps", False, f"exit status {code}; see above", "mend what is told above"),
            ]
    return [*_found(work), Finding("two steps", "ok", "trained, saved and published, in the doctor's folder")]


def _config_of(config: dict[str, Any], scratch: Path, corpus: dict[str, Any] | None) -> dict[str, Any]:
    """The run's own, in another folder: what it reads of the run keeps its path."""
    trainer = config["trainer"]
    checkpoint = {**trainer["checkpoint"], "every_steps": None, "every_minutes": None}
    probe = {
        "_target_": "pipeline.doctor.probe.Probe",
        "keep": trainer["checkpoint"]["keep"],
        "run_dir": config["run_dir"],
        "corpus": corpus or {},
    }
    callbacks = {key: node for key, node in config["callbacks"].items() if key != "doctor"}
    return {
        **config,
        "run_dir": str(scratch),
        "trainer": {**trainer, "log_every_steps": 1, "checkpoint": checkpoint},
        "callbacks": {**callbacks, "doctor": probe},  # the last: it looks at what the others did
        "logger": None,
        "doctor": {"asked": {"logger": config["logger"]}},
    }


def _found(work: Path) -> list[Finding]:
    return [
        Finding(**each)
        for name in _FILES
        if (work / name).exists()
        for each in json.loads((work / name).read_text())["found"]
    ]
