"""The schema of conf/: what may be said at all.

Hydra composes the yaml files; `parse` merges the result back into these dataclasses, so that neither a typo in a
yaml nor `+a.typo=1` passes. Nodes with a `_target_` are typed by the constructor they name instead; the check process
holds them against it. Imports nothing heavy: the front door answers `--cfg job` through this module.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import (
    ConfigKeyError,
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from models.errors import Refusal
from models.files import hash_of
from pipeline.secrets import refuse_secret_variables, refuse_secrets


@dataclass
class Checkpoint:
    every_steps: int | None = None  # optimizer steps between checkpoints
    every_minutes: float | None = 15.0  # or by the clock of rank 0, whichever comes first
    keep: int = 2  # newest complete checkpoints kept while the stage trains; with 1 a damaged one is the end
    asynchronous: bool = True  # written while training goes on, from a copy in host memory


@dataclass
class Trainer:
    """Hardware and cadence: nothing here changes what is learnt, except `precision`."""

    accelerator: str = "auto"  # cpu | cuda | auto
    devices: Any = "auto"  # processes per node
    nodes: int = 1
    precision: str = "32-true"  # or bf16-mixed: bf16 compute over fp32 master weights
    attention: str = "auto"  # FlashAttention 2 where installed, else transformers' choice; or sdpa | eager | flash_…
    log_every_steps: int = 10
    objective_memory_mb: int | None = None  # what a chunk of logits may take; null chooses
    compile: bool = False  # the objective's terms through torch.compile: faster where runs are long
    checkpoint: Checkpoint = field(default_factory=Checkpoint)


@dataclass
class Resume:
    """What becomes of stages that were begun or made with other values; `resume=overwrite` sets the mode."""

    mode: str = "continue"  # or overwrite: redo what was made with other values
    from_step: int | None = (
        None  # an unfinished stage goes back to this checkpoint, with changed values of its training
    )
    skip_sequences: list[int] = field(default_factory=list)  # and from there on without these sequences


@dataclass
class Forecast:
    """What a run would take elsewhere; `forecast=true` sets `show`."""

    show: bool = False  # tell, start nothing
    gpu: str = "h100"  # a100-40gb | a100 | h100 | h200 | b200 | l40s | rtx4090 | mi300x; or cpu, for memory alone
    gpus: int | None = None  # how many; null: trainer.devices × trainer.nodes
    gpus_per_node: int = 8  # whose ranks share a machine's memory
    efficiency: float = 0.4  # share of the GPU's peak that a run reaches (MFU); Llama 3 reached 0.38 to 0.43
    usable_memory: float = 0.9  # share of the GPU's memory; the rest is CUDA's, NCCL's and lost between tensors
    json: bool = False  # the same as JSON on one line


@dataclass
class Config:
    name: str = MISSING
    run_dir: str = MISSING
    seed: int = 0
    order: list[str] = MISSING  # the stages of the run, in order
    only: list[str] | None = None  # these stages of the order alone; `stages=[a,b]` says the same
    start: str | None = None
    stop: str | None = None
    force: list[str] = field(default_factory=list)  # redo these although they are finished
    resume: Resume = field(default_factory=Resume)
    dry_run: bool = False  # show the plan and stop
    prepare_only: bool = False  # of each stage what one process does before its ranks start: text and first weights
    forecast: Forecast = field(default_factory=Forecast)
    show_data: int = 0  # show so many sequences of the first stage that trains, with what is learnt of them, and stop
    doctor: bool = False  # run what trains for two steps on some of its text, check it from inside, and stop
    prepare_data: str | None = None  # I/N: prepare a share of the text of the first stage that trains, and stop
    share: str | None = None  # I/N: make a share of the one stage that is chosen, record or generate, and stop
    sized_for: list[float] | None = None  # parameters of the models that an experiment's settings are made for
    stages: dict[str, Any] = MISSING
    data: Any = None
    task: Any = None
    answers: Any = None  # what a stage `generate` writes, as data
    verdict: Any = None  # what counts as no difference from the reference, and what is required
    model: Any = None  # what is pruned, quantized or exported
    teacher: Any = None
    student: Any = None
    objective: Any = None
    divergence: Any = None
    auxiliaries: dict[str, Any] = field(default_factory=dict)
    on_policy: Any = None
    lora: Any = None
    qat: Any = None
    importance: Any = None
    encoding: Any = None
    filters: dict[str, Any] = field(default_factory=dict)
    optimizer: Any = None
    schedule: Any = None
    scheme: Any = None
    quantizer: Any = None
    sparsity: Any = None
    formats: Any = None  # folder of an export → what is written there
    trainer: Trainer = field(default_factory=Trainer)
    strategy: Any = None
    logger: Any = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    launch: Any = None


def nearest(word: str, words: list[str]) -> str:
    """', did you mean …?' for the closest of `words`, or the words themselves when none is close."""
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    close = close or [known for known in words if known == "".join(part[:1] for part in word.split("_"))]  # lr
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(words))}"


def typed(composed: Any, key: str) -> str:
    """The key that a person sets: where a node on the way is taken from another place, that place's."""
    node, parts = composed, key.split(".")
    for at, part in enumerate(parts):
        if not OmegaConf.is_dict(node) or part not in node:
            return key
        if OmegaConf.is_interpolation(node, part):
            source = re.fullmatch(r"\$\{([\w.]+)\}", str(dict(node.items_ex(resolve=False))[part]))
            return typed(composed, ".".join([source[1], *parts[at + 1 :]])) if source else key
        node = None if OmegaConf.is_missing(node, part) else node[part]
    return key


def parse(composed: Any) -> dict[str, Any]:
    """Hydra's composed config → plain resolved dict that fits the schema. Raises Refusal in one line."""
    unresolved: Any = OmegaConf.to_container(composed, resolve=False)
    for name, node in unresolved["stages"].items():
        if not isinstance(node, dict):
            value = "null" if node is None else node
            raise Refusal(f"stages.{name}={value}: need settings; a stage is left out with only=[…] or stop=…")
    try:
        plain = _numbers(OmegaConf.to_container(composed, resolve=True))
        if (plain.get("model") or {}).get("path") == "???":  # no stage takes it, or the line above had raised
            plain["model"]["path"] = None
        merged = OmegaConf.merge(OmegaConf.structured(Config), plain)
        config: dict[str, Any] = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except ConfigKeyError as problem:
        key = str(problem.full_key or problem.key)
        parent, _, last = key.rpartition(".")
        node = OmegaConf.select(OmegaConf.structured(Config), parent) if parent else OmegaConf.structured(Config)
        known = [str(k) for k in node] if node is not None else []
        raise Refusal(f"unknown config key {key!r}{nearest(last, known)}") from None
    except (MissingMandatoryValue, InterpolationToMissingValueError) as problem:
        found = re.search(r"Missing mandatory value: (\w+\.[\w.]+)", str(problem))  # of an interpolation
        key = typed(composed, found[1] if found else str(problem.full_key))
        raise Refusal(f"{key} is not set; give {key}=…") from None
    except OmegaConfBaseException as problem:
        raise Refusal(f"{problem.full_key or 'config'}: {str(problem).splitlines()[0]}") from None
    refuse_secrets({key: node for key, node in config.items() if key != "stages"})  # whence most of theirs comes
    refuse_secrets(config)
    refuse_secret_variables((config["launch"] or {}).get("site") or {})
    order = config["order"]
    for name in order:
        if name not in config["stages"]:
            raise Refusal(
                f"order names the stage {name!r}, which stages does not define{nearest(name, list(config['stages']))}"
            )
        if not isinstance(config["stages"][name], dict) or "_target_" not in config["stages"][name]:
            raise Refusal(
                f"stages.{name} is no stage, having no _target_: select the others with only=[…], or take one from "
                f"conf/stage, as `- /stage@stages.{name}: NAME` in the experiment's defaults"
            )
    if unknown := [name for name in config["stages"] if name not in order]:
        node = config["stages"][unknown[0]]
        if not isinstance(node, dict) or "_target_" not in node:
            raise Refusal(f"unknown stage stages.{unknown[0]}{nearest(unknown[0], order)}")
        raise Refusal(
            f"stages.{unknown[0]} is not in order, which says when a stage runs: add it, e.g. "
            f"order=[{','.join([*order, *unknown])}]; to run some stages alone, give only=[{','.join(order)}] instead"
        )
    if not config["run_dir"]:
        raise Refusal("run_dir is empty; give run_dir=FOLDER")
    resume = config["resume"]
    if resume["mode"] not in ("continue", "overwrite"):
        raise Refusal(f"resume={resume['mode']}: need continue or overwrite")
    if any(number < 0 for number in resume["skip_sequences"]):
        raise Refusal(f"resume.skip_sequences={resume['skip_sequences']}: need numbers of sequences, from 0 on")
    if resume["skip_sequences"] and resume["from_step"] is None:
        raise Refusal(
            "resume.skip_sequences is for an unfinished stage; add resume.from_step=STEP, from where they are left out"
        )
    for name, value in config["forecast"].items():
        if not config["forecast"]["show"] and value != getattr(Forecast, name):
            raise Refusal(f"forecast.{name}={value}: it says where a forecast is of; add forecast=true")
    asked = {"dry_run": config["dry_run"], "forecast": config["forecast"]["show"], "doctor": config["doctor"]}
    asked |= {name: config[name] for name in ("show_data", "prepare_data", "prepare_only", "share")}
    if len(both := [name for name, value in asked.items() if value and name != "dry_run"]) > 1:
        raise Refusal(f"{both[0]} and {both[1]}: each is all that a command does; give one of them")
    if config["show_data"] < 0:
        raise Refusal(f"show_data={config['show_data']}: need a number of sequences to show, or 0 for none")
    for name in ("prepare_data", "share"):
        if config[name] is not None and share(config[name]) is None:
            raise Refusal(f"{name}={config[name]}: need I/N, the number of this job, from 1 on, of N, as 1/16")
    for option in ("start", "stop"):
        if config[option] is not None and config[option] not in order:
            raise Refusal(f"{option}={config[option]}: no such stage{nearest(config[option], order)}")
    for option, names in (("only", config["only"] or []), ("force", config["force"])):
        for name in names:
            if name not in order:
                raise Refusal(f"{option}=[{name}]: no such stage{nearest(name, order)}")
    return config


COUNTS = re.compile(r"(^|_)(parameters|tokens|bytes)$")
_SUFFIXES = {"K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def _numbers(node: Any, key: str = "") -> Any:
    """Counts of parameters, tokens and bytes as whole numbers: 6B, 900M and 6e9 are 6,000,000,000, … ."""
    if isinstance(node, dict):
        return {name: _numbers(value, str(name)) for name, value in node.items()}
    if isinstance(node, list):
        return [_numbers(value) for value in node]
    if not COUNTS.search(key):
        return node
    if isinstance(node, str) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)([KMGBT])", node.strip(), re.IGNORECASE)):
        return int(Decimal(found[1]) * _SUFFIXES[found[2].upper()])
    return int(node) if isinstance(node, float) and node.is_integer() else node


def selected(config: dict[str, Any]) -> list[str]:
    """The stages this command runs, in order."""
    order = config["order"]
    first = order.index(config["start"]) if config["start"] else 0
    last = order.index(config["stop"]) if config["stop"] else len(order) - 1
    if first > last:
        raise Refusal(f"start={config['start']} comes after stop={config['stop']}; the order is {', '.join(order)}")
    chosen = [n for n in order[first : last + 1] if config["only"] is None or n in config["only"]]
    if not chosen:
        raise Refusal(f"start, stop and only leave nothing to do; the order is {', '.join(order)}")
    return chosen


def _none_of(target: str) -> Collection[str]:
    return ()


def share(given: str) -> tuple[int, int] | None:
    """A job's number, from 1 on, and how many there are; None where it says neither."""
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    return (int(found[1]), int(found[2])) if found and 1 <= int(found[1]) <= int(found[2]) else None


def identity(
    config: dict[str, Any],
    stage: str,
    immaterial: Callable[[str], Collection[str]],
    compared_by_content: Callable[[str], Collection[str]] = _none_of,
    parents: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The part of the configuration that decides what `stage` makes.

    `immaterial` names, for a node's `_target_`, the keys of that very node (or `a.b` below it) which change nothing
    beyond rounding: another value of theirs neither invalidates a finished stage nor forbids to go on in an unfinished
    one. `compared_by_content` names those whose files are compared by what they hold (parents of the stage): local ones
    are written as `<local file>`, so that they may be moved. So may local models that the stage reads (`parents`: role
    → path), which are written as `<role>`, and the run folder, paths into which are written as `<run_dir>/…`.
    """
    root = config["run_dir"].rstrip("/")
    roles = {path: f"<{role}>" for role, path in (parents or {}).items() if Path(path).exists()}

    def clean(node: Any) -> Any:
        if isinstance(node, dict):
            target = node.get("_target_")
            left_out, moving = (immaterial(target), compared_by_content(target)) if target else ((), ())
            kept = {k: clean(_without(v, k, left_out)) for k, v in node.items() if k not in left_out}
            return kept | {k: _without_place(kept[k]) for k in moving if k in kept}
        if isinstance(node, list):
            return [clean(v) for v in node]
        if isinstance(node, str) and (node == root or node.startswith(root + "/")):
            return "<run_dir>" + node[len(root) :]
        return roles.get(node, node) if isinstance(node, str) else node

    cleaned: dict[str, Any] = clean(config["stages"][stage])
    return cleaned


def _without(node: Any, key: str, names: Collection[str]) -> Any:
    """A node without those of its keys that `names` has as `KEY.NAME`."""
    return {k: v for k, v in node.items() if f"{key}.{k}" not in names} if isinstance(node, dict) else node


def _without_place(node: Any) -> Any:
    """Paths, or a list of them, without where they lie; hub ids and names of embedded texts stay."""
    if isinstance(node, list):
        return [_without_place(each) for each in node]
    if not isinstance(node, str) or not node or not (path := Path(node).expanduser()).exists():
        return node
    return "<local folder>" if path.is_dir() else f"<local file>{path.suffix}"


def fingerprint(value: Any) -> str:
    return f"sha256:{hash_of(value)}"


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) for every leaf that differs; absent is shown as `None`."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted({*old, *new})
            for d in differences(old.get(k), new.get(k), f"{prefix}.{k}" if prefix else k)
        ]
    return [] if old == new else [(prefix, old, new)]
