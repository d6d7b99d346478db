"""Stages of an experiment run in this process, as their own would do it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore

from pipeline.artifact import content_hash
from pipeline.building import build
from pipeline.check import immaterial
from pipeline.config import Config, identity, parse
from pipeline.context import Context
from tests.command import ROOT


def composed(run_dir: Path, *words: str) -> dict[str, Any]:
    ConfigStore.instance().store(name="schema", node=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return parse(compose("config", [f"run_dir={run_dir}", *words]))


def run_stage(made: Any, context: Context) -> Path:
    """As its own process would do it."""
    made.prepare(context)
    made.run(context)
    shutil.rmtree(context.work, ignore_errors=True)
    return context.out


def make(config: dict[str, Any], stage: str) -> Path:
    made, context = build(config, stage), Context(config, stage)
    _know_parents(made, context)
    return run_stage(made, context)


def _know_parents(made: Any, context: Context) -> None:
    for role, path in made.parents(context).items():
        context.parents[role] = {"path": path, "content_hash": content_hash(Path(path))}


@dataclass(frozen=True)
class Experiment:
    name: str
    words: list[str]  # that make it small

    def composed(self, run_dir: Path, *words: str) -> dict[str, Any]:
        return composed(run_dir, f"+experiment={self.name}", *self.words, *words)

    def begin(self, run_dir: Path, stage: str, *words: str) -> tuple[Any, Context]:
        config = self.composed(run_dir, *words)
        told = identity(config, stage, immaterial)
        made, context = build(config, stage), Context(config, stage, identity=told, fingerprint=" ".join(words))
        _know_parents(made, context)
        return made, context

    def make(self, run_dir: Path, stage: str, *words: str) -> Path:
        return run_stage(*self.begin(run_dir, stage, *words))


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found
