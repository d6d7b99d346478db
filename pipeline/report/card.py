"""The model card of an export: its measurements and certificate, how it is served, where it comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline import artifact
from pipeline.report.columns import BITS, COLUMNS

Json = dict[str, Any]


def text(*, run: str, name: str, model: str, manifest: Json, device: str, serving: Sequence[tuple[str, str]]) -> str:
    """The card, in Markdown, of the export `name` of the model at `model`.

    `manifest` is the export's own. `device` names the hardware that the speed was measured on. `serving` are
    (runtime, shell command) of the runtimes that load the export.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    certificates = manifest["certificates"]
    return templates.get_template("card.md.j2").render(
        run=run,
        format=name,
        lineage=lineage(model),
        told=certificates,
        stored=_stored(certificates["fallbacks"]),
        runtime=certificates["runtime"],
        metrics=manifest["metrics"],
        row=_row(manifest["metrics"]),
        device=device,
        serving=serving,
        versions=manifest["versions"],
    )


def _stored(fallbacks: Mapping[str, str]) -> dict[str, Any]:
    """What is held otherwise than asked: `subjects` (tokenizer, context), which have sentences, and `parameters`, which
    have types; `summed` is of the latter, the most frequent type first."""
    parameters = {name: kind for name, kind in fallbacks.items() if "." in name}
    counts = Counter(parameters.values()).most_common()
    return {
        "subjects": {name: told for name, told in fallbacks.items() if name not in parameters},
        "parameters": parameters,
        "summed": ", ".join(f"{count} {'is' if count == 1 else 'are'} {kind}" for kind, count in counts),
    }


def _row(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(heading, figure) as the report has them; speed and memory where they were measured."""
    shown = [column for column in (*COLUMNS, BITS) if metrics.get(column.key) is not None]
    return [(column.heading, column.show(metrics[column.key])) for column in shown]


def lineage(path: str) -> list[dict[str, Any]]:
    """The model's own stage first, then its parents; each stands there once."""
    found: dict[str, dict[str, Any]] = {}

    def walk(role: str, at: str, known: str | None, deep: int) -> None:
        if at in found or deep > 32:
            return
        manifest = artifact.read_manifest(Path(at))
        found[at] = {
            "role": role,
            "stage": manifest["stage"] if manifest else Path(at).name,
            "hash": ((manifest or {}).get("content_hash") or known or "").removeprefix("sha256:")[:12],
            "recipe": _recipe(manifest) if manifest else "",
        }
        for name, parent in ((manifest or {}).get("parents") or {}).items():
            if name != "data":
                walk(name, parent["path"], parent.get("content_hash"), deep + 1)

    walk("model", path, None, 0)
    return list(found.values())


def _recipe(manifest: dict[str, Any]) -> str:
    """A stage's own settings in short: plain values, and the class names of what has settings of its own."""
    parts = []
    for key, value in (manifest.get("config") or {}).items():
        if isinstance(value, dict) and "_target_" in value:
            parts.append(_built(key, value))
        elif isinstance(value, int | float | str) and not key.startswith("_") and key != "trust_remote_code":
            parts.append(f"{key} {value}")
    return "; ".join(parts)


def _built(key: str, node: dict[str, Any]) -> str:
    """A class with its first plain values, and whatever it is built of itself (a scheme's weights and activations)."""
    plain = {k: v for k, v in node.items() if k != "_target_" and isinstance(v, int | float | str | bool)}
    inner = [f"{k} {v}" for k, v in list(plain.items())[:5]]
    inner += [_built(k, v) for k, v in node.items() if isinstance(v, dict) and "_target_" in v]
    return f"{key} {node['_target_'].rpartition('.')[2]}" + (f" ({', '.join(inner)})" if inner else "")
