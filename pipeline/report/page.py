"""What the report says, as text, before it becomes Markdown or HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.context import left_at
from pipeline.report import units
from pipeline.report.columns import columns_of, notes_on, plain
from pipeline.report.manifests import Artifact, parents_of

Json = dict[str, Any]


def page_of(run_dir: Path, artifacts: Sequence[Artifact], report: Json) -> Json:
    """What the Markdown and the HTML page both show, as text."""
    columns = columns_of(report["rows"])
    manifests = {artifact.name: artifact.manifest for artifact in artifacts}
    cost = [
        (name, plain(m.get("steps")), units.si(m.get("tokens")), units.duration(m.get("seconds")), _speed(m))
        for name, m in manifests.items()
    ]
    return {
        "run": run_dir.resolve().name,
        "headings": ["stage", *(column.heading for column in columns)],
        "rows": [[row["stage"], *(column.show(row.get(column.key)) for column in columns)] for row in report["rows"]],
        "notes": [
            *notes_on(report["rows"]),
            *(note for name, m in manifests.items() for note in _of_training(name, m)),
            *_cut(manifests),
        ],
        "verdicts": [{"verdict": each["verdict"], "sentence": each["sentence"]} for each in report["verdicts"]],
        "comparisons": [
            {
                "sentence": sentence(comparison),
                "change": units.percent(comparison["relative"]).replace("-", "−"),
                "better": (comparison["relative"] or 0) < 0,
                "sides": [
                    (comparison["stage"], units.score(comparison["perplexity"])),
                    (comparison["against"], units.score(comparison["against_perplexity"])),
                ],
            }
            for comparison in report["comparisons"]
        ],
        "lineage": [
            {
                "stage": name,
                "hash": _short_hash(manifest["content_hash"]) if manifest["files"] else "",  # results are the manifest
                "parents": [_parent(role, parent, manifests) for role, parent in parents_of(manifest).items()],
            }
            for name, manifest in manifests.items()
        ],
        "cost": cost,
        "total": units.duration(sum(m.get("seconds") or 0 for m in manifests.values())),
        "environment": _environment(manifests),
    }


def _parent(role: str, parent: Json, manifests: dict[str, Json]) -> Json:
    name = Path(parent["path"]).name
    known = manifests.get(name)
    replaced = bool(known and parent.get("content_hash") and known["content_hash"] != parent["content_hash"])
    return {
        "role": "" if role == name else role,
        "name": name if known else parent["path"],
        "hash": _short_hash(parent.get("content_hash")),
        "replaced": replaced,
    }


def _of_training(name: str, manifest: Json) -> list[str]:
    """What speaks against it, and where it was taken up from a checkpoint with other values than it was begun with."""
    told = [f"{name}: {manifest['doubt']}."] if manifest.get("doubt") else []
    turns = manifest.get("turns") or []
    for at, turn in enumerate(turns):
        changes = [f"{key} {plain(old)} → {plain(new)}" for key, old, new in turn["changed"]]
        if (left := left_at(turns, at)) is not None:  # what it left out no longer is
            changed = f" with changes: {'; '.join(changes)}" if changes else ""
            told.append(f"{name} was taken up at step {turn['step']}{changed} (left again, for step {left}).")
            continue
        not_read = turn.get("not_read", [])
        if left_out := [str(number) for number in turn["skipped"] if number not in not_read]:
            changes.append(f"without the sequences {', '.join(left_out)}")
        if not_read:
            changes.append(
                f"the sequences {', '.join(map(str, not_read))} were to be left out, but are not read from there on"
            )
        told.append(f"{name} was taken up at step {turn['step']} with changes: {'; '.join(changes) or 'none'}.")
    return told


def _cut(manifests: dict[str, Json]) -> list[str]:
    """What the limit of the length took of the text, once for all stages that read the same."""
    stages: dict[str, list[str]] = {}
    for name, manifest in manifests.items():
        data = (manifest.get("metrics") or {}).get("data") or {}
        for split, counted in ({"train": data} if "sequences" in data else data).items():
            if isinstance(counted, dict) and (lost := counted.get("cut")):
                stages.setdefault(f"{split}: {lost}.", []).append(name)
    return [f"{', '.join(names)}: {lost}" for lost, names in stages.items()]


def _short_hash(content_hash: str | None) -> str:
    return (content_hash or "").removeprefix("sha256:")[:8]


def _speed(manifest: Json) -> str:
    seconds, tokens = manifest.get("seconds"), manifest.get("tokens")
    return units.si(tokens / seconds) if seconds and tokens else units.NOTHING


def _environment(manifests: dict[str, Json]) -> list[tuple[str, str]]:
    """Commit, seed and library versions; where stages differ, each value with its stages."""
    stages: dict[str, dict[str, list[str]]] = {}
    for name, manifest in manifests.items():
        commit = manifest.get("git_commit") or "not a git checkout"
        facts = {"commit": commit, "seed": manifest.get("seed"), **manifest.get("versions", {})}
        for key, value in facts.items():
            if value is not None:
                stages.setdefault(key, {}).setdefault(str(value), []).append(name)
    return [
        (key, "; ".join(v if len(values) == 1 else f"{v} ({', '.join(names)})" for v, names in values.items()))
        for key, values in stages.items()
    ]


def short_verdicts(report: Json) -> list[str]:
    """A line for each reference: which models are how."""
    lines = []
    for against in dict.fromkeys(each["against"] for each in report["verdicts"]):
        of = [each for each in report["verdicts"] if each["against"] == against]
        parts = []
        for verdict in dict.fromkeys(each["verdict"] for each in of):
            parts.append(f"{verdict}: {', '.join(each['stage'] for each in of if each['verdict'] == verdict)}")
        lines.append(f"against {against}, {'; '.join(parts)}")
    return lines


def sentence(comparison: Json) -> str:
    """A comparison of two models in one line."""
    known = comparison.get("relative_interval")
    sure = f" (95 %: {units.percent(known[0])} to {units.percent(known[1])})" if known else ""
    return (
        f"{comparison['stage']} {units.score(comparison['perplexity'])} against {comparison['against']} "
        f"{units.score(comparison['against_perplexity'])}: {units.percent(comparison['relative'])}{sure}"
    )
