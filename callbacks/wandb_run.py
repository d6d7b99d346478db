"""Weights & Biases runs that never stop a training run when they open, and lose nothing when they close. No torch."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import wandb

from models.errors import Refusal, Stopped

_OF_SWEEP = ("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID")
_opened: list["wandb.Run"] = []  # of this process: one at most
_lost = False  # its service is gone: what is left of the stage goes on without


def start(identity: str | None, mode: str, restart: int, settings: dict[str, Any]) -> "wandb.Run":
    """Online, the id stays the same over restarts. Offline, a second folder with the same id would replace the first
    when both are synced; so each restart is a run of its own, `<id>-r<restart>`.

    An agent of a sweep names one run, and a command has several: that name is the closing run's (`identity=None`).
    """
    global _lost
    _lost = False
    os.environ.setdefault("WANDB_DATA_DIR", settings["dir"])  # a table waits there to be synced, and not at home
    if identity is not None:
        for name in _OF_SWEEP:
            os.environ.pop(name, None)
    # this module prints the one line that a person needs, and a progress bar does not belong in a log
    wandb.setup(settings=wandb.Settings(silent=True, console="off"))
    run = _online(identity, mode, settings) if (reason := _no_account(mode)) is None else reason
    if isinstance(run, str):
        identified: dict[str, Any] = {} if identity is None else {"id": f"{identity}-r{restart}"}
        reason, run = run, wandb.init(mode="offline", **identified, **settings)
        print(f"W&B: offline, {reason}; later: wandb sync {os.path.dirname(run.dir)}", flush=True)
    _opened[:] = [run]
    return run


def _no_account(mode: str) -> str | None:
    if (wanted := os.environ.get("WANDB_MODE", "online")) != "online":
        return f"WANDB_MODE={wanted}"
    if mode == "offline":
        return "logger.mode=offline"
    if wandb.login(prompt=False, verify=False):
        return None
    if mode == "online":
        raise Refusal("logger.mode=online: W&B finds no account; run wandb login, or use logger.mode=auto")
    return "no account found (wandb login)"


def reachable(mode: str) -> tuple[bool, str]:
    """Whether the server takes this account's key, where one is to be asked."""
    wandb.setup(settings=wandb.Settings(silent=True, console="off"))
    try:
        if (reason := _no_account(mode)) is not None:
            return "no account" not in reason, f"W&B offline: {reason}"
        wandb.login(prompt=False, verify=True, relogin=True)
    except (Refusal, wandb.errors.Error, OSError) as problem:
        return False, _first_line(problem)
    return True, "W&B answers, and takes the key"


def _online(identity: str | None, mode: str, settings: dict[str, Any]) -> "wandb.Run | str":
    """The run, or why there is none."""
    try:
        identified: dict[str, Any] = {} if identity is None else {"id": identity, "resume": "allow"}
        run = wandb.init(mode="online", **identified, **settings)
        print(f"W&B: {run.url}", flush=True)
        return run
    except wandb.errors.Error as error:
        if mode == "online":
            raise Refusal(f"logger.mode=online: {_first_line(error)}; use logger.mode=auto or offline") from None
        return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def opened() -> "wandb.Run | None":
    """The run of this process that is not ended."""
    return _opened[0] if _opened else None


def lost() -> bool:
    """Whether the run that was started last broke off."""
    return _lost


@contextmanager
def surviving() -> Iterator[None]:
    """Whatever W&B says in here ends no training: it is told, once, and the run is given up.

    Its service is a process of its own, and a signal to a whole Slurm step ends it: it handles SIGTERM by itself, so
    that neither an inherited SIG_IGN nor a signal mask keeps it.
    """
    global _lost
    try:
        yield
    except Exception as problem:
        if not _lost:
            print(f"W&B: {_first_line(problem)}; the stage goes on without it, metrics.jsonl has all steps", flush=True)
        _lost = True
        given_up = _opened[:]
        _opened.clear()
        for run in given_up:  # which takes their own exit handlers out, too
            with suppress(Exception):
                run.finish(exit_code=1)
        if isinstance(problem, ConnectionError):
            with suppress(Exception):
                wandb.teardown()


def end(problem: BaseException | None = None) -> None:
    """The open run, with what had not been written of it. One that was told to make way is no failure: W&B shows it as
    preempted, and what is started next goes on in it. Raises nothing."""
    while _opened:
        run, code = _opened[0], 0 if problem is None else problem.status if isinstance(problem, Stopped) else 1
        with surviving():
            if isinstance(problem, Stopped):
                run.mark_preempting()
            run.finish(exit_code=code)
        _opened.clear()


def log_result(run: "wandb.Run", group: str, stage: str, path: Path, manifest: Mapping[str, Any]) -> None:
    """What a stage has made, and of what: an artifact for each, which name their files and upload none; and the figures
    of the manifest as the run's summary."""
    parents = manifest.get("parents") or {}
    for role, parent in parents.items():
        _use(run, _parent(group, path.parent, role, parent))
    run.log_artifact(_made(f"{group}-{stage}", manifest["kind"], path, manifest["content_hash"]))
    run.config.update(
        {"lineage": {"content_hash": manifest["content_hash"], "parents": parents}}, allow_val_change=True
    )
    told = {name: manifest[name] for name in ("steps", "tokens", "seconds", "metrics", "certificates", "doubt")
            if manifest.get(name) is not None}  # fmt: skip
    run.summary.update({f"result/{key}": value for key, value in _leaves(told)})


def log_table(run: "wandb.Run", report: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The report's table, and each of its figures by itself (`distill/perplexity`), for a sweep to go by."""
    rows = report["rows"]
    logged: dict[str, Any] = {f"{row['stage']}/{key}": value for row in rows for key, value in _figures(row)}
    told = [{key: each[key] for key in ("stage", "against", "verdict", "sentence")} for each in report["verdicts"]]
    for name, lines in {"report": rows, "comparisons": report["comparisons"], "verdicts": told}.items():
        if lines:
            columns: list[Any] = list(dict.fromkeys(key for line in lines for key in line))
            cells = [[_cell(line.get(column)) for column in columns] for line in lines]
            logged[name] = wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
    run.log(logged)


def _figures(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list | dict) else value


def _leaves(node: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{before}{key}/")
        elif isinstance(value, int | float | str):
            yield f"{before}{key}", value


def _use(run: "wandb.Run", artifact: "wandb.Artifact") -> None:
    """As an input. `use_artifact` refuses offline, although the record that it writes can be synced: it is written."""
    if run.offline:
        run._log_artifact(artifact, is_user_created=True, use_after_commit=True)
    else:
        run.use_artifact(artifact)


def _parent(group: str, run_dir: Path, role: str, parent: Mapping[str, str]) -> "wandb.Artifact":
    """The artifact that the stage which made it has logged, if one of this run has, or one of its own. The same content
    is the same version, whoever logs it first."""
    where, content = parent["path"], parent["content_hash"]
    path = Path(where)
    if role == "data":
        return _made(f"{group}-text", "dataset", None, content, sources=where)
    if content.startswith("hub:"):
        repository, _, commit = where, *content.rpartition("@")[1:]
        link = f"https://huggingface.co/{repository}/tree/{commit}"
        return _made(repository, "model", None, content, link=link)
    try:
        kind = json.loads((path / "manifest.json").read_text())["kind"]
    except (OSError, ValueError, KeyError):
        kind = "model"
    return _made(f"{group}-{path.name}" if path.parent == run_dir else path.name, kind, path, content)


def _made(name: str, kind: str, path: Path | None, content: str, link: str = "", **told: str) -> "wandb.Artifact":
    """By reference: the folder's path, and the hash of its content, which decides whether it is another version."""
    where = {"path": str(path)} if path is not None else {}
    metadata = {"content_hash": content, **where, **told}
    artifact = wandb.Artifact(re.sub(r"[^A-Za-z0-9_.-]+", "-", name)[:120], kind, metadata=metadata)
    for reference, uri in {"link": link, "content": re.sub(r"^(?!\w+:)", "sha256:", content)}.items():
        if uri:
            artifact.add_reference(uri, name=reference, checksum=False)
    if path is not None and path.exists():
        artifact.add_reference(path.absolute().as_uri(), checksum=False)
    return artifact
