"""What is to be done for each stage: by what stands in the run folder, and what it was made of. Loads no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.files import read_text
from models.training.saved import checkpoints, damage, step_of
from pipeline import artifact, run_folder
from pipeline.config import differences, fingerprint
from pipeline.shared import root

BEGUN = "stage.json"  # in a stage's work folder: of what and with what values it was begun
# of the training, between two checkpoints: what neither the order of the data nor the optimizer's state depends on
_CHANGEABLE = re.compile(
    r"training\.(optimizer\.(?!_target_|amsgrad|momentum)|schedule|(weight_decay|gradient_clip|max_steps|max_tokens|epochs"
    r"|validate_every_steps)$)"
)


def jobs_of(config: dict[str, Any], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """What is to be done for each stage: start, resume, turn (resume with other values), redo, skip. Refuses what was
    made with other values."""
    run_folder.check_whole(config)
    jobs: list[dict[str, Any]] = []
    for name, entry in plan.items():
        told = entry["identity"]
        job = {"stage": name, "identity": told, "fingerprint": fingerprint(told), "plan": entry}
        busy = {other["stage"] for other in jobs if other["do"] != "skip"}
        verdict = verdict_of(config, job, busy)
        folder = Path(config["run_dir"]) / name
        if verdict != "skip" and artifact.look(folder).state != "absent" and (others := artifact.foreign(folder)):
            raise Refusal(
                f"{folder / others[0]} is not Retort's, and would be lost with what is made again; move it away"
            )
        if verdict in ("start", "redo") and config["resume"]["mode"] != "overwrite":
            _check_told(Path(config["run_dir"]) / "work" / name)
        jobs.append({**job, "do": verdict})
    step = config["resume"]["from_step"]
    if step is not None and not any(job["do"] in ("turn", "resume") or _has_turned(config, job) for job in jobs):
        raise Refusal(
            f"resume.from_step={step}: none of {', '.join(plan)} is unfinished and has a checkpoint; leave it out, or "
            f"begin a finished stage again with force=[STAGE]"
        )
    return jobs


def _has_turned(config: dict[str, Any], job: dict[str, Any]) -> bool:
    """Whether a finished stage was taken up as this command says: then it has nothing left to do."""
    manifest = artifact.read_manifest(Path(config["run_dir"]) / job["stage"]) or {}
    last = (manifest.get("turns") or [{}])[-1]
    return (last.get("step"), last.get("skipped")) == (
        config["resume"]["from_step"],
        config["resume"]["skip_sequences"],
    )


def verdict_of(config: dict[str, Any], job: dict[str, Any], busy: set[str]) -> str:
    """`busy`: the stages before this one that will not be skipped."""
    name, told, entry = job["stage"], job["identity"], job["plan"]
    run_dir = Path(config["run_dir"])
    work = run_dir / "work" / name
    finished = artifact.read_manifest(run_dir / name)
    started = begun(work)
    if started and finished and started["attempt"] == finished["attempt"]:
        started = None  # killed after its result was in place
    same = started is not None and not differences(started["identity"], told)  # a new key that is null is no change
    if started and not same and not steps_of(work):
        started = None  # refused or killed before it had learnt anything: nothing to protect
    if started is None and finished is None:
        return "start"
    made_here = {
        role
        for role, path in entry["parents"].items()
        if Path(path).parent == root(config) and Path(path).name in config["stages"]
    }
    stale = any(Path(entry["parents"][role]).name in busy for role in made_here)
    parents = {} if stale else parents_of(config, entry)

    def other_parents(old: dict[str, Any]) -> set[str]:
        def hash_of(where: dict[str, Any], role: str) -> Any:
            return where.get(role, {}).get("content_hash")

        return {r for r in {*parents, *old["parents"]} if hash_of(parents, r) != hash_of(old["parents"], r)}

    # An attempt that was cut short goes on, whether it was begun by itself, by force or by resume=overwrite.
    if started and not stale and not other_parents(started):
        if turn_of(config, started, told) is not None:
            return "turn"
        if same:
            return "resume"
    of_share = config["share"] is not None
    if name in config["force"] and not (of_share and finished and name in finished["run_config"]["force"]):
        return "redo"  # but for a share that was forced already: it waits for the stage, which may take many jobs
    old: dict[str, Any] = finished or started  # type: ignore[assignment]
    changed = differences(old["config"] if finished else old["identity"], told)
    others = set() if stale else other_parents(old)
    changed += [
        (f"parents.{role}", _short(old["parents"].get(role)), _short(parents.get(role)))
        for role in sorted(others - made_here)
    ]
    if changed and config["resume"]["mode"] != "overwrite" and not of_share:  # of which all is kept that still fits
        end = _end_of(told)
        steps = [step for step in steps_of(work) if end is None or step < end] if started else []
        raise Refusal(_differs(run_dir, name, changed, steps))
    return "redo" if changed or stale or others else "skip"


def parents_of(config: dict[str, Any], entry: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Role → path and content hash, of the models a stage reads and of its text."""
    run_dir = Path(config["run_dir"])
    cache = run_folder.hashes(run_dir)
    found = {}
    for role, path in entry["parents"].items():
        folder, manifest = Path(path), None
        if folder.parent != run_dir or folder.name not in config["force"]:
            remedy = f"remove its {artifact.MANIFEST} if you changed it on purpose"
            here = artifact.look(folder)
            run_folder.check_unchanged(folder, here, run_dir, remedy)
            manifest = here.manifest
        commit = entry["commits"].get(role)  # of a hub id; a changed repository is another parent
        if manifest is not None:
            content = manifest["content_hash"]
        elif folder.exists():
            content = artifact.content_hash(folder, cache)
        else:
            content = f"hub:{path}@{commit}"
        found[role] = {"path": path, "content_hash": content}
    if entry["content"]:
        found["data"] = {"path": ", ".join(entry["data"]["train"]["sources"]), "content_hash": entry["content"]}
    return found


def turn_of(config: dict[str, Any], started: dict[str, Any], told: dict[str, Any]) -> dict[str, Any] | None:
    """Where an unfinished stage is to be taken up with other values, or None: `step`, what was `changed`, and which
    sequences are `skipped` from there on. None, too, where that was done before and this command goes on in it."""
    resume, turns = config["resume"], started.get("turns") or []
    step, skipped = resume["from_step"], resume["skip_sequences"]
    if step is None:
        return None
    last = turns[-1] if turns else {}
    if (last.get("step"), last.get("skipped")) == (step, skipped) and not differences(started["identity"], told):
        return None
    changed = differences(started["identity"], told)
    if others := [key for key, _, _ in changed if not _CHANGEABLE.match(key)]:
        raise Refusal(
            f"resume.from_step={step}: {others[0]} cannot change between two checkpoints, the learning rate, its "
            f"schedule, weight decay, clipping and length can; give the old value, or begin anew with resume=overwrite"
        )
    end = _end_of(told)
    if end is not None and step >= end:
        raise Refusal(
            f"resume.from_step={step}: training ends at max_steps={end}; give a step before it, or a larger max_steps"
        )
    work = Path(config["run_dir"]) / "work" / started["stage"]
    if step not in (steps := steps_of(work)):
        there = f"the checkpoints are of {', '.join(map(str, steps))}" if steps else "there is no checkpoint yet"
        raise Refusal(f"resume.from_step={step}: {started['stage']} has none of that step; {there}")
    if (problem := damage(checkpoints_of(work)[step])) is not None:
        raise Refusal(f"resume.from_step={step}: that checkpoint is damaged ({problem}); give another of {steps}")
    _check_skipped(skipped, work)
    return {"step": step, "changed": [[*change] for change in changed], "skipped": skipped}


def _end_of(told: dict[str, Any]) -> int | None:
    """The step that training ends at, at the latest, where its settings say so."""
    end: int | None = (told.get("training") or {}).get("max_steps")
    return end


def _check_skipped(skipped: list[int], work: Path) -> None:
    """Before anything is removed or written: the text was counted when the stage was begun, and cannot have changed."""
    if not skipped:
        return
    path = work / artifact.PREPARED
    try:
        count = int(json.loads(read_text(path))["statistics"]["train"]["sequences"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise Refusal(
            f"resume.skip_sequences={skipped}: {path} does not say how many sequences there are; restore it, or leave "
            f"resume.skip_sequences out"
        ) from None
    if beyond := [number for number in skipped if number >= count]:
        raise Refusal(f"resume.skip_sequences={beyond}: the text makes {count:,} sequences, from 0 on")


def after_not_finite(config: dict[str, Any], stage: str) -> str:
    """What to do about a stage that ended with a number that is not finite: the same command would end alike."""
    optimizer = config["stages"][stage].get("training", {}).get("optimizer") or {}
    key = "optimizer.lr" if optimizer == config.get("optimizer") else f"stages.{stage}.training.optimizer.lr"
    lower = f"a lower {key}= (it is {optimizer['lr']})" if "lr" in optimizer else "a lower learning rate"
    alike = "the same command would end alike"
    if not (steps := steps_of(Path(config["run_dir"]) / "work" / stage)):
        return f"{alike}, and no checkpoint was saved yet; run it again with {lower}"
    return (
        f"{alike}; add resume.from_step={steps[-1]} (its last checkpoint) and {lower}, or resume.skip_sequences=[…] "
        f"with the sequences of the line above"
    )


def checkpoints_of(work: Path) -> dict[int, Path]:
    """Step → folder, in order."""
    return {step_of(path): path for path in checkpoints(work / "checkpoints")}


def steps_of(work: Path) -> list[int]:
    return list(checkpoints_of(work))


def _differs(run_dir: Path, stage: str, changed: list[tuple[str, Any, Any]], steps: list[int]) -> str:
    keys = "; ".join(f"{key}: {old!r} → {new!r}" for key, old, new in changed[:8])
    more = f" and {len(changed) - 8} more" if len(changed) > 8 else ""
    back = all(_CHANGEABLE.match(key) for key, _, _ in changed) and steps
    turn = f"resume.from_step={steps[-1]} to go on with them from there, " if back else ""
    return (
        f"{run_dir / stage} was made with other values ({keys}{more}); add {turn}resume=overwrite to redo it, choose "
        f"another run_dir=…, or give the old values"
    )


def begun(work: Path) -> dict[str, Any] | None:
    """What a stage that was begun in `work` has written of itself, or None where none was."""
    path = work / BEGUN
    try:
        found: dict[str, Any] = artifact.checked(json.loads(read_text(path)))
        if not {"identity", "parents", "restart", "attempt"} <= found.keys():
            raise ValueError
        return found
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError, RecursionError):
        problem = "it was changed since it was written, or does not say how the stage was begun"
    except OSError as failure:
        problem = str(failure.strerror)
    raise Refusal(f"{path}: {problem}; restore it, or move {work} away to begin the stage again") from None


def _check_told(work: Path) -> None:
    """Refuse to remove what an unfinished stage has made where the file is gone that says how it was begun. It is the
    first that is written, and the folder is removed under another name."""
    made = sorted(path.name for path in work.glob("*") if not path.name.startswith("."))
    if made and BEGUN not in made:
        raise Refusal(
            f"{work}: it holds {made[0]} of an unfinished stage, and no {BEGUN}, which says how that was begun; "
            f"restore it, move {work} away, or add resume=overwrite to begin anew without it"
        )


def _short(parent: dict[str, str] | None) -> str | None:
    return None if parent is None else f"{parent['path']} {parent['content_hash'][:19]}"
