"""What a stage's process knows of its surroundings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.artifact import PLANNED_QUANTIZED, Makes, read_manifest, write_json
from pipeline.config import share
from pipeline.provenance import git_commit, versions
from pipeline.shared import Made, made, root
from pipeline.training.strategy import Strategy

_CONF = Path(__file__).resolve().parent.parent / "conf"


@dataclass
class Context:
    """One stage in one process (of possibly many ranks)."""

    config: dict[str, Any]  # the whole resolved configuration
    stage: str
    parents: dict[str, dict[str, str]] = field(default_factory=dict)  # role → path and content hash
    identity: dict[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    attempt: str = ""  # names this making of the stage, over all its restarts
    restart: int = 0  # how often this stage was started before
    turns: list[dict[str, Any]] = field(
        default_factory=list
    )  # where it was taken up with other values (pipeline/run.py)
    plans: Path | None = None  # check process only: a folder of configs of models to be made
    planned: list[str] = field(default_factory=list)  # check process only: stages that will have run before this one
    place: str | None = None  # check process only: what the stage will run on, where that is elsewhere: cuda or cpu

    @property
    def run_dir(self) -> Path:
        return Path(self.config["run_dir"])

    @property
    def out(self) -> Path:
        """The finished artifact's folder."""
        return self.run_dir / self.stage

    @property
    def work(self) -> Path:
        """Everything of the stage that is not finished: checkpoints, and how it was begun."""
        return self.run_dir / "work" / self.stage

    @property
    def data_folder(self) -> Path:
        """Prepared sequences, shared by the stages, and by the jobs that share out one."""
        return root(self.config) / "work" / "data"

    @property
    def share(self) -> tuple[int, int] | None:
        """Of the stage, where several jobs share it out: this one's number, from 1 on, and how many there are."""
        return None if (given := self.config.get("share")) is None else share(given)

    def shares(self) -> list[Made]:
        """What other jobs have made of this stage that it can take over."""
        forced, by = self.stage in self.config["force"], None if self.share is None else self.run_dir
        return [*made(root(self.config), self.stage, forced=forced, by=by)]

    @property
    def seed(self) -> int:
        return int(self.config["stages"][self.stage].get("seed", self.config["seed"]))

    @property
    def skipped(self) -> dict[int, int]:
        """Packed sequence → from which step on it is left out."""
        found: dict[int, int] = {}
        for at, turn in enumerate(self.turns):
            if left_at(self.turns, at) is None:
                found |= {number: turn["step"] for number in turn["skipped"] if number not in found}
        return found

    @property
    def rank(self) -> int:
        return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))

    @property
    def device(self) -> str:
        """cpu or cuda."""
        import torch

        wanted = self.config["trainer"]["accelerator"].replace("gpu", "cuda")  # Lightning's word for it
        if wanted not in ("auto", "cpu", "cuda"):
            raise Refusal(f"trainer.accelerator={wanted}: need auto, cpu or cuda")
        if self.place is not None:
            return self.place
        if wanted == "cuda" and not torch.cuda.is_available():
            raise Refusal(
                "trainer.accelerator=cuda: PyTorch sees no CUDA device here; use trainer.accelerator=cpu, or a "
                "CUDA build of torch"
            )
        return "cuda" if wanted != "cpu" and torch.cuda.is_available() else "cpu"

    @property
    def devices(self) -> int:
        """Processes per node of a stage that trains."""
        import torch

        wanted = self.config["trainer"]["devices"]
        if wanted == "auto":
            return 1 if self.device == "cpu" or not self.strategy.several_ranks else torch.cuda.device_count()
        if not isinstance(wanted, int) or wanted < 1:
            raise Refusal(f"trainer.devices={wanted}: need a positive number or auto")
        return wanted

    @property
    def strategy(self) -> Strategy:
        from hydra.utils import instantiate

        made: Strategy = instantiate(self.config["strategy"])
        return made

    @property
    def on_this_machine(self) -> bool:
        """Whether the ranks run here, not in jobs that are submitted or on a GPU that is named for a forecast."""
        from hydra.utils import instantiate

        return bool(instantiate(self.config["launch"]).on_this_machine) and self.place is None

    @property
    def world(self) -> int:
        return self.devices * int(self.config["trainer"]["nodes"])

    def manifest(self, kind: Makes) -> dict[str, Any]:
        """What every manifest of an artifact says; `kind` is what the stage makes."""
        return {"stage": self.stage, "kind": kind, **self.provenance(), "run_config": self.config}

    def provenance(self) -> dict[str, Any]:
        """What this making of the stage follows from."""
        return {
            "parents": self.parents,
            "config": self.identity,
            "fingerprint": self.fingerprint,
            "attempt": self.attempt,
            **({"turns": self.turns} if self.turns else {}),
            "seed": self.seed,
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def makes(self, stage: str) -> Makes:
        """What a stage of this run makes, by its contract."""
        from hydra.utils import get_class

        found: Makes = get_class(self.config["stages"][stage]["_target_"]).makes  # type: ignore[attr-defined]
        return found

    def setting(self, stage: str, field: str) -> str:
        """How a field of a stage is set on the command line: by the choice at the top where the stage takes that."""
        if field == "model" and self.config["stages"][stage].get(field) == (self.config["model"] or {}).get("path"):
            return "model.path"
        chosen = self.config.get(field)
        taken = chosen is not None and self.config["stages"][stage].get(field) == chosen
        return field if taken else f"stages.{stage}.{field}"

    def in_its_words(self, message: str) -> str:
        """A message of this stage, which names settings by the kind of stage (`prune.kinds`) or from the stage on
        (`calibration.samples`), with the keys under which a person sets them in this run. A setting of a kind of stage
        that the run has none of comes with the experiment that has one."""
        stages, order = self.config["stages"], self.config["order"]
        node = stages[self.stage]
        before = order[: order.index(self.stage)]

        def key(found: re.Match[str]) -> str:
            first, second = found.groups()
            for name in (self.stage, *reversed(before)):
                if stages[name]["_target_"].split(".")[-2] == first and second in stages[name]:
                    return self.setting(name, second)
            if first not in self.config and isinstance(node.get(first), dict) and second in node[first]:
                return f"{self.setting(self.stage, first)}.{second}"
            if experiment := _experiment_with(first, second, beside=self.stage):
                return f"+experiment={experiment} {second if second in self.config else f'stages.{first}.{second}'}"
            return found[0]

        return re.sub(r"(?<![\w./-])(\w+)\.(\w+)", key, message)

    def produced_by(self, path: str) -> str | None:
        """The stage of this run whose artifact `path` is, if any."""
        candidate = Path(path)
        return candidate.name if candidate.parent == self.run_dir and candidate.name in self.config["stages"] else None

    def finished(self, path: str) -> bool:
        """Whether `path` holds a finished artifact."""
        return read_manifest(Path(path)) is not None

    def config_folder(self, path: str) -> str:
        """Where the model's config can be read now: the check process plans models that are still to be made."""
        if self.plans is not None and self.produced_by(path) and (self.plans / Path(path).name).exists():
            return str(self.plans / Path(path).name)
        return path

    def plan_model(self, hf_config: Any) -> None:
        """In the check process: what this stage will make, for the stages after it."""
        assert self.plans is not None
        hf_config.save_pretrained(self.plans / self.stage)

    def plan_quantized(self, said: dict[str, Any]) -> None:
        """In the check process, of a planned model: the outline of its quantized weights."""
        assert self.plans is not None
        write_json(self.plans / self.stage / PLANNED_QUANTIZED, said)


def left_at(turns: Sequence[dict[str, Any]], at: int) -> int | None:
    """The step of the later turn that left the way which turn `at` took; None where that way was gone to the end."""
    return next((later["step"] for later in turns[at + 1 :] if later["step"] <= turns[at]["step"]), None)


def _experiment_with(stage: str, field: str, beside: str) -> str:
    """The simplest experiment that has a stage with this field, for a model of one's own; with the stage `beside` too
    where there is one. "" where there is none."""
    shelf = _CONF / "stage" / f"{stage}.yaml"
    if not shelf.is_file() or not re.search(rf"^{field}:", shelf.read_text(), re.MULTILINE):
        return ""
    texts = {path.stem: path.read_text() for path in (_CONF / "experiment").glob("*.yaml")}
    fit = [name for name, text in texts.items() if f"stages.{stage}: {stage}\n" in text and "${model.path}" in text]
    return min(fit, key=lambda name: (f"stages.{beside}: " not in texts[name], len(texts[name])), default="")
