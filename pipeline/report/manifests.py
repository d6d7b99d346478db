"""The manifests of a run folder, read into the order in which the report shows them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.artifact import METRICS
from pipeline.report.chart import Point

Json = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder: its manifest, and its curves as (step, nats) points."""

    name: str
    folder: Path
    manifest: Json
    training: list[Point]
    validation: list[Point]


def read_artifacts(run_dir: Path) -> list[Artifact]:
    """The finished stages: parents before children, otherwise in the order the evaluation lists them."""
    found = {}
    for path in sorted(run_dir.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Refusal(f"{path} is not JSON ({error}): delete that folder and run its stage again") from None
        if manifest["stage"] == path.parent.name:  # a folder that is still being written has another name
            curves = _curves(path.parent / METRICS)
            found[path.parent.name] = Artifact(path.parent.name, path.parent, manifest, *curves)
    evaluated = [
        row["stage"] for a in found.values() if a.manifest["kind"] == "results" for row in a.manifest["metrics"]["rows"]
    ]
    ordered: dict[str, Artifact] = {}
    pending = [name for name in evaluated if name in found] + list(found)

    def place(name: str) -> None:
        if name in found:
            artifact = found.pop(name)
            for parent in parents_of(artifact.manifest).values():
                place(Path(parent["path"]).name)
            ordered[name] = artifact

    for name in pending:
        place(name)
    return list(ordered.values())


def parents_of(manifest: Json) -> Json:
    """Role → path and content hash."""
    return manifest.get("parents") or {}


def _curves(path: Path) -> tuple[list[Point], list[Point]]:
    """Training and validation points; a torn line of a killed run and a loss that is not a number are left out."""
    curves: dict[str, list[Point]] = {"loss": [], "validation_loss": []}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        for key, points in curves.items():
            if isinstance(values.get(key), int | float) and math.isfinite(values[key]):
                points.append((float(values["step"]), float(values[key])))
    return curves["loss"], curves["validation_loss"]
