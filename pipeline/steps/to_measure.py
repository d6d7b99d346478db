"""What the stage `evaluate` measures: models by their role in the report, and exports by stage and format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.formats.container import check_installed
from models.formats.format import Format
from models.teachers.cache import HEADER
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.stages.stage import contract_of


def exports_to_measure(context: Context, models: list[str] | None) -> dict[str, tuple[str, Format]]:
    """Role (stage/format) → stage and format, of every export that will be measured.

    Formats are those of the run's own stages: a manifest could name any class.
    """
    order, stages = context.config["order"], context.config["stages"]
    found = {}
    for name in order[: order.index(context.stage)]:
        if context.makes(name) != "exports":
            continue
        if name not in context.planned and artifact.read_manifest(context.run_dir / name) is None:
            continue
        for folder, form in contract_of(context, name).exports(stages[name]).items():
            role = f"{name}/{folder}"
            if models is None or {name, role} & set(models):
                found[role] = (name, form)
    return found


def models_to_measure(context: Context, models: list[str] | None, teacher: Source | None) -> dict[str, str]:
    """Role → folder of every model that will be measured: of `models`, or all that the run has made and `teacher`."""
    if models is not None:
        exports = exports_to_measure(context, models)
        wanted = [m for m in models if m not in exports and m not in {name for name, _ in exports.values()}]
        names = [Path(m).name for m in wanted]
        if twice := [m for m, name in zip(wanted, names, strict=True) if names.count(name) > 1]:
            raise Refusal(f"evaluate.models: {', '.join(twice)} would bear one name in the report; rename a folder")
        return {Path(m).name: str(context.run_dir / m) if m in context.config["order"] else m for m in wanted}
    order = context.config["order"]
    found = {
        name: str(context.run_dir / name)
        for name in order[: order.index(context.stage)]
        if (name in context.planned and context.makes(name) == "model")
        or (artifact.read_manifest(context.run_dir / name) or {}).get("kind") == "model"
    }
    # A teacher that is served, or of which only the cache is left, cannot be measured here.
    path = teacher.path if teacher is not None and teacher.runs_here else None
    if path and not (Path(path) / HEADER).is_file() and not context.produced_by(path):
        found = {"teacher": path, **found}
    return found


def check_exports(context: Context, exports: dict[str, tuple[str, Format]]) -> None:
    """In the check: refuse exports that have not been made, or whose packages are not installed."""
    for role, (stage, form) in exports.items():
        name = role.partition("/")[2]
        if stage not in context.planned and name not in formats_of(context, stage):
            raise Refusal(
                f"{context.stage}: {stage} has made no {name}; run {stage} too, or leave it out with "
                f"{context.setting(stage, 'formats')}.{name}=null"
            )
        check_installed(f"{context.setting(stage, 'formats')}.{name}", form)


def check_unchanged(context: Context, exports: dict[str, tuple[str, Format]]) -> None:
    """Refuse exports whose files are not those that were certified."""
    for stage in dict.fromkeys(stage for stage, _ in exports.values()):
        certified = artifact.read_manifest(context.run_dir / stage)
        if certified is None or artifact.content_hash(context.run_dir / stage) != certified["content_hash"]:
            raise Refusal(
                f"{context.run_dir / stage}: its files have changed since they were certified; force=[{stage}] "
                f"makes them anew"
            )


def formats_of(context: Context, stage: str) -> dict[str, dict[str, Any]]:
    """Folder → its figures, of the exports that a stage has made."""
    manifest = artifact.read_manifest(context.run_dir / stage)
    return artifact.exports_of(manifest) if manifest else {}


def bytes_on_disk(folder: str) -> int | None:
    """Of the model itself: weights, config, tokenizer; not of what was logged beside it."""
    path = Path(folder)
    if not path.is_dir():
        return None
    beside = (
        artifact.MANIFEST,
        artifact.CARD,
        artifact.QUANTIZED,
        *artifact.BESIDE,
    )  # and folders: adapters that are merged already
    return sum(p.stat().st_size for p in path.glob("*") if p.is_file() and p.name not in beside)
