"""Where a stage's processes run: here, under torchrun, or as a step of a Slurm job.

A stage is the unit that is launched. A launcher turns (ranks, command) into a command line and an environment; the
parent runs it and looks at the exit status.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from models.errors import Refusal
from pipeline.config import nearest

ROOT = str(Path(__file__).resolve().parent.parent)


class Launcher(Protocol):
    several_nodes: ClassVar[bool]
    on_this_machine: ClassVar[bool]  # one rank is a plain process, a child of the command that was typed

    @property
    def submits(self) -> bool:
        """Whether the command that was typed only submits the stages (pipeline/submission.py), as jobs."""
        ...

    def nodes(self, given: int, devices: Any, shares: Sequence[tuple[Any, Any]]) -> int:
        """How many of the `given` nodes a command uses; `shares`: global_batch and micro_batch of what it trains."""
        ...

    @property
    def variables(self) -> dict[str, str]:
        """Of the environment of every rank, beside what `environment` says."""
        ...

    def check(self) -> None:
        """Refuse, before a stage starts, surroundings in which no process could be started."""
        ...

    def command(self, arguments: list[str], *, ranks: int, nodes: int) -> list[str]:
        """The command line that runs `python -m ARGUMENTS` once per rank."""
        ...


@dataclass(frozen=True)
class Local:
    """One process, or torchrun with one process per device of this machine."""

    several_nodes: ClassVar[bool] = False
    on_this_machine: ClassVar[bool] = True
    submits: ClassVar[bool] = False
    variables: ClassVar[dict[str, str]] = {}

    def nodes(self, given: int, devices: Any, shares: Sequence[tuple[Any, Any]]) -> int:
        return given

    def check(self) -> None:
        """There is always this machine."""

    def command(self, arguments: list[str], *, ranks: int, nodes: int) -> list[str]:
        if ranks == 1:
            return [sys.executable, "-m", *arguments]
        return [
            sys.executable,
            "-m",
            "pipeline.torchrun",
            "--standalone",
            f"--nproc-per-node={ranks}",
            "-m",
            *arguments,
        ]


@dataclass(frozen=True)
class Slurm:
    """Outside of an allocation, a job for each stage. Inside, `srun`, one task per device; the ranks find each other
    through Slurm's own variables."""

    several_nodes: ClassVar[bool] = True
    on_this_machine: ClassVar[bool] = False
    arguments: list[str] = field(default_factory=list)  # further words for srun, e.g. a container's
    resources: dict[str, Any] = field(default_factory=dict)  # of each stage's job (pipeline/resources.py)
    site: dict[str, Any] = field(default_factory=dict)  # what the cluster asks of every job
    elastic: bool = False  # a job may start on fewer nodes than it asks for

    def __post_init__(self) -> None:
        kinds = {
            "account": str,
            "partition": str,
            "options": list,
            "setup": list,
            "environment": dict,
            "arguments": list,
        }
        for key, value in self.site.items():
            if key not in kinds:
                raise Refusal(f"launch.site.{key}: unknown{nearest(key, list(kinds))}")
            if value is not None and not isinstance(value, kinds[key]):
                needed = {str: "a name", list: "a list of texts", dict: "NAME: VALUE"}[kinds[key]]
                raise Refusal(f"launch.site.{key}={value}: need {needed}")

    @property
    def submits(self) -> bool:
        return not os.environ.get("SLURM_JOB_ID")

    def nodes(self, given: int, devices: Any, shares: Sequence[tuple[Any, Any]]) -> int:
        """All; but where the job may have started on fewer than it asks for, as many as can share out the micro-batches
        of every step."""
        whole = all(isinstance(each, int) and each > 0 for each in (given, devices, *itertools.chain(*shares)))
        if not self.elastic or self.submits or not whole:
            return given
        fits = (n for n in range(given, 0, -1) if all(batch % (micro * n * devices) == 0 for batch, micro in shares))
        return next(fits, given)

    @property
    def variables(self) -> dict[str, str]:
        return {name: str(value) for name, value in (self.site.get("environment") or {}).items()}

    def check(self) -> None:
        needed = "sbatch" if self.submits else "srun"
        if shutil.which(needed) is None:
            raise Refusal(
                f"launch=slurm: there is no {needed} on the PATH; call it where Slurm's programs are, or leave "
                f"launch=slurm out"
            )

    def command(self, arguments: list[str], *, ranks: int, nodes: int) -> list[str]:
        used = nodes if ranks > 1 else 1
        return [
            "srun",
            f"--nodes={used}",
            f"--ntasks={ranks}",
            f"--ntasks-per-node={ranks // used}",
            # A dead rank must end its peers, which wait for it in a collective; but not at once: where all ranks are
            # to end with PREEMPTED, the first would have the others killed, and srun would answer 143 instead.
            "--kill-on-bad-exit=0",
            "--wait=60",
            # A rank picks its GPU and shares its node's cores itself, whatever a site binds by default.
            "--gpu-bind=none",
            "--cpu-bind=none",
            "--export=ALL",  # also under `sbatch --export=NONE`, which srun would inherit
            *(self.site.get("arguments") or []),
            *self.arguments,
            sys.executable,
            "-u",
            "-m",
            *arguments,
        ]


def die_with(parent: int) -> None:
    """End this process when `parent` ends, however it ends: nobody must train on, unseen, into a run folder.

    Linux alone; called by every process of a stage, and by the launcher's process before it becomes torchrun or srun.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)


def environment(ranks_here: int, device: str) -> dict[str, str]:
    """Of a stage's process. Ranks that share a machine's cores must share them out, or they fight."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH", "")]))}
    if device == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        env["CUDA_VISIBLE_DEVICES"] = ""
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks_here)))
    # The distributed launcher's own advice and warnings would drown the progress bar.
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return env
