"""What the jobs of a run ask a cluster for: nodes, ranks, GPUs, cores, memory, time. Loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.utils import instantiate

from models.errors import Refusal
from pipeline.config import nearest

_DEFAULTS = ("parallel", "single", "prepare")
NOTICE_SECONDS = 300  # before a job's end it is told, to save what it has
# As sbatch takes it, but for its MINUTES and MINUTES:SECONDS, which are easily meant as hours.
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d+):(\d+)|(\d+)-(\d+)(?::(\d+))?")
_MEMORY = re.compile(r"0|[1-9]\d*[KMGT]B?", re.I)  # a bare number would be MB
_RANKS_PER_NODE = 8  # where neither launch.resources nor trainer.devices says how many


@dataclass(frozen=True)
class Resources:
    """Of one job."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    cpus_per_rank: int
    memory: str  # of a node, as sbatch's --mem
    time: str  # as sbatch's --time
    partition: str | None = None
    options: list[str] = field(default_factory=list)  # further options of sbatch
    jobs: int = 1  # an array of so many shares out the stage before its own job; of `prepare`: the text, before that

    def words(self, *, elastic: bool) -> list[str]:
        """Options of sbatch. `elastic`: fewer nodes will do; then a node is one task for sbatch, which would otherwise
        give as many nodes as tasks on one at the most."""
        tasks, cores = f"--ntasks-per-node={self.ranks_per_node}", self.cpus_per_rank
        said = [
            f"--nodes={'1-' if elastic else ''}{self.nodes}",
            *([] if elastic else [tasks]),
            f"--gpus-per-node={self.gpus_per_node}",  # not --gpus-per-task: a rank sees its node's, and takes its own
            f"--cpus-per-task={cores * self.ranks_per_node if elastic else cores}",
            f"--mem={self.memory}",
            f"--time={self.time}",
        ]
        return said + ([f"--partition={self.partition}"] if self.partition else []) + self.options

    @property
    def told(self) -> str:
        """For a person."""
        per_node = f"{self.gpus_per_node} GPUs" if self.gpus_per_node else f"{self.ranks_per_node} × CPU"
        return f"{self.nodes} × {per_node}"


_NAMES = [each.name for each in fields(Resources)]
_OF_RANKS = [name for name in _NAMES if name != "jobs"]
_WHOLE = ("nodes", "ranks_per_node", "gpus_per_node", "cpus_per_rank", "jobs")


def check_names(told: dict[str, Any], stages: Collection[str]) -> None:
    """Refuse entries of launch.resources that no stage reads."""
    for name, entry in told.items():
        if name not in _DEFAULTS and name not in stages:
            raise Refusal(f"launch.resources.{name}: no stage of this run{nearest(name, [*_DEFAULTS, *stages])}")
        if entry is None and name == "prepare":
            continue
        if not isinstance(entry, dict):
            raise Refusal(f"launch.resources.{name}={entry}: need settings; set {', '.join(_NAMES)} one by one")
        known = _NAMES if name == "prepare" else _OF_RANKS if name in _DEFAULTS else [*_NAMES, "prepare"]
        for key in entry:
            if key not in known:
                raise Refusal(f"launch.resources.{name}.{key}: unknown{nearest(key, known)}")


def of_stage(told: dict[str, Any], stage: str, config: dict[str, Any], *, parallel: bool) -> Resources:
    """Of the job that runs `stage`. `told`: launch.resources; `parallel`: it runs on all ranks that there are."""
    kind = "parallel" if parallel else "single"
    own = {key: value for key, value in (told.get(stage) or {}).items() if key != "prepare"}
    if not parallel and (own.get("nodes", 1), own.get("ranks_per_node", 1)) != (1, 1):
        key = "nodes" if own.get("nodes", 1) != 1 else "ranks_per_node"
        raise Refusal(f"launch.resources.{stage}.{key}={own[key]}: this stage is one process; leave it out")
    return _made({**told[kind], **own}, stage, config)


def of_preparing(told: dict[str, Any], stage: str, config: dict[str, Any]) -> Resources | None:
    """Of the job that does before a parallel stage what one process does; None where the stage's own job does it."""
    own = (told.get(stage) or {}).get("prepare", {})
    if told["prepare"] is None or own is None:
        return None
    if not isinstance(own, dict) or (unknown := [key for key in own if key not in _NAMES]):
        at = "" if not isinstance(own, dict) else f".{unknown[0]}"
        raise Refusal(f"launch.resources.{stage}.prepare{at}: need settings of {', '.join(_NAMES)}, or null")
    return _made({**told["prepare"], **own}, f"{stage}.prepare", config)


def _seconds(time: str) -> float | None:
    """None where it is no time."""
    if time.lower() in ("infinite", "unlimited"):
        return math.inf
    if (found := _TIME.fullmatch(time)) is None:
        return None
    days, hours, minutes, seconds, other_days, other_hours, other_minutes = (int(each or 0) for each in found.groups())
    return 86400 * (days + other_days) + 3600 * (hours + other_hours) + 60 * (minutes + other_minutes) + seconds


def _made(settings: dict[str, Any], where: str, config: dict[str, Any]) -> Resources:
    said = dict(settings)
    if said["ranks_per_node"] == "auto":
        said["ranks_per_node"] = _RANKS_PER_NODE if instantiate(config["strategy"]).several_ranks else 1
    if said["gpus_per_node"] == "auto":
        said["gpus_per_node"] = 0 if config["trainer"]["accelerator"] == "cpu" else said["ranks_per_node"]
    for key in (key for key in _WHOLE if key in said):
        least = 0 if key == "gpus_per_node" else 1
        if not isinstance(said[key], int) or isinstance(said[key], bool) or said[key] < least:
            raise Refusal(f"launch.resources.{where}.{key}={said[key]}: need a whole number of at least {least}")
    gpus, ranks = said["gpus_per_node"], said["ranks_per_node"]
    if gpus and gpus != ranks:
        raise Refusal(
            f"launch.resources.{where}.gpus_per_node={gpus}: a rank takes one GPU, and ranks_per_node is {ranks}; give "
            f"the same number, or gpus_per_node=0"
        )
    if isinstance(said["time"], int) or (isinstance(said["time"], str) and said["time"].isdigit()):
        raise Refusal(  # sbatch's minutes, which a YAML file makes of 12:00:00 too: 43200 of them, a month
            f"launch.resources.{where}.time={said['time']}: need HOURS:MINUTES:SECONDS, in a file within quotes, as "
            f'"12:00:00"'
        )
    for key in ("memory", "time"):
        if not isinstance(said[key], str | int) or isinstance(said[key], bool) or not str(said[key]).strip():
            raise Refusal(f"launch.resources.{where}.{key}={said[key]}: need a text, as sbatch takes it")
        said[key] = str(said[key])
    if (seconds := _seconds(said["time"])) is None:
        raise Refusal(
            f"launch.resources.{where}.time={said['time']}: need HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    if seconds <= NOTICE_SECONDS:
        raise Refusal(
            f"launch.resources.{where}.time={said['time']}: a job has notice {NOTICE_SECONDS // 60} minutes before its "
            f"end, and makes way then; need more, as 0:30:00"
        )
    if not _MEMORY.fullmatch(said["memory"]):
        raise Refusal(
            f'launch.resources.{where}.memory={said["memory"]}: need a number with its unit, as 128G, or "0" '
            f"for all of a node's"
        )
    options, partition = said.get("options") or [], said.get("partition")
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise Refusal(f'launch.resources.{where}.options={options}: need a list, as ["--exclusive"]')
    if partition is not None and (not isinstance(partition, str) or not partition or set(partition) & set(" \t\n")):
        raise Refusal(f"launch.resources.{where}.partition={partition}: need the name of a partition, or null")
    return Resources(**{**said, "options": options})
