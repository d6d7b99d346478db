"""What the evaluations of a run measured, one row for each model, and the comparisons between models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pipeline.artifact import BESIDE, QUANTIZED, exports_of
from pipeline.report.columns import BITS, COLUMNS, FIELDS
from pipeline.report.manifests import Artifact, parents_of

Json = dict[str, Any]


def measurements(artifacts: Sequence[Artifact]) -> Json:
    """What report.json holds: `rows`, one for each model and each export, `comparisons` and `verdicts`.

    Models that no evaluation measured have a row too, with what their manifests know.
    """
    rows, told = _measured(artifacts)
    measured = {stage for stage, _ in rows}
    for artifact in artifacts:
        if artifact.manifest["kind"] == "model" and artifact.name not in measured:
            rows[artifact.name, str(artifact.folder)] = _unmeasured(artifact)
        if artifact.manifest["kind"] == "exports":
            for form, figures in exports_of(artifact.manifest).items():
                if (name := f"{artifact.name}/{form}") not in measured:
                    rows[name, str(artifact.folder / form)] = _unmeasured_export(artifact, form, figures)
    return {"rows": _finite(list(rows.values())), **_finite(told)}


def _measured(artifacts: Sequence[Artifact]) -> tuple[dict[tuple[str, str], Json], dict[str, list[Json]]]:
    """(stage, path) → row, and the comparisons and verdicts, of all evaluations; figures of a model that was made again
    since are left out."""
    by_name = {artifact.name: artifact for artifact in artifacts}
    rows: dict[tuple[str, str], Json] = {}
    told: dict[str, list[Json]] = {"comparisons": [], "verdicts": []}
    for results in (a.manifest for a in artifacts if a.manifest["kind"] == "results"):
        parents, replaced = parents_of(results), set()
        for row in results["metrics"]["rows"]:
            owner = row["stage"].partition("/")[0]  # export/gptq belongs to the stage export
            artifact = by_name.get(owner)
            measured = parents.get(owner, {}).get("content_hash")
            if artifact and measured and measured != artifact.manifest["content_hash"]:
                replaced.add(row["stage"])
                continue
            known = rows.setdefault((row["stage"], row["path"]), dict.fromkeys(FIELDS))
            # a second evaluation may add what the first did not measure, and replaces nothing
            known.update({key: value for key, value in row.items() if known.get(key) is None})
        for kind, kept in told.items():
            kept += [
                each
                for each in results["metrics"].get(kind, [])
                if not {each["stage"], each["against"]} & replaced and each not in kept
            ]
    return rows, told


def _unmeasured(artifact: Artifact) -> Json:
    """What a model's manifest knows without an evaluation."""
    manifest = artifact.manifest
    files = manifest["files"]
    return dict.fromkeys(FIELDS) | {
        "stage": artifact.name,
        "path": str(artifact.folder.resolve()),
        "parameters": manifest.get("metrics", {}).get("parameters"),
        "bytes": sum(
            file["bytes"] for name, file in files.items() if name not in (*BESIDE, QUANTIZED) and "/" not in name
        ),
        "seconds": manifest.get("seconds"),
        "tokens": manifest.get("tokens"),
        **({} if (bits := manifest.get("metrics", {}).get(BITS.key)) is None else {BITS.key: bits}),
    }


def _unmeasured_export(artifact: Artifact, form: str, figures: Json) -> Json:
    """`figures` are those that the export stage took for the model card."""
    return dict.fromkeys(FIELDS) | {
        "stage": f"{artifact.name}/{form}",
        "path": str((artifact.folder / form).resolve()),
        "parameters": (artifact.manifest.get("metrics") or {}).get("parameters"),
        **{column.key: figures[column.key] for column in (*COLUMNS, BITS) if column.key in figures},
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; null stands for both."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
