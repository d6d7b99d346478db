"""What a run came to: every manifest of a run folder laid side by side, as JSON, Markdown, one HTML page and a table.

The parent process imports this, so nothing here loads torch. The same folder always gives the same bytes.
"""

import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich import box
from rich.table import Table
from rich.text import Text

from models.errors import Refusal
from pipeline.artifact import BESIDE, GRID, METRICS
from pipeline.report import chart, units

Json = dict[str, Any]

MOST_POINTS = 240  # of one curve; longer ones are averaged, as a page has no more pixels


class Column(NamedTuple):
    key: str
    heading: str
    short: str  # for a terminal of 80 columns
    show: Callable[[Any], str]


def _fixed(decimals: int) -> Callable[[float | None], str]:
    return lambda value: units.NOTHING if value is None else f"{value:.{decimals}f}"


COLUMNS = (
    Column("parameters", "parameters", "params", units.si),
    Column("bytes", "on disk", "disk", units.size),
    Column("perplexity", "test perplexity", "test\nppl", units.score),
    Column("bits_per_byte", "bits per byte", "bits/\nbyte", _fixed(3)),
    Column("generate_tokens_per_second", "generate tokens/s", "gen.\ntok/s", units.si),
    Column("prefill_tokens_per_second", "prefill tokens/s", "prefill\ntok/s", units.si),
    Column("first_token_ms", "first token (ms)", "first\ntoken\nms", _fixed(1)),
    Column("peak_memory_bytes", "peak memory", "peak\nmem.", units.size),
    Column("seconds", "time spent", "time", units.duration),
    Column("tokens", "tokens spent", "tokens", units.si),
)
# Of a task, where there is one.
TASK_COLUMNS = (
    Column("accuracy", "accuracy", "acc.", _fixed(3)),
    Column("accuracy_on_training_queries", "accuracy on training queries", "acc.\ntrain", _fixed(3)),
    Column("gap_closed", "gap closed", "gap\nclosed", _fixed(3)),
    Column("gap_closed_low", "gap closed, 2.5 %", "low", _fixed(3)),
    Column("gap_closed_high", "gap closed, 97.5 %", "high", _fixed(3)),
    Column("gap_closed_on_training_queries", "gap closed on training queries", "gap\ntrain", _fixed(3)),
)
# What a terminal has no room for beside a task's figures; the page has all.
_ASIDE = {"bits_per_byte", "prefill_tokens_per_second", "first_token_ms", "peak_memory_bytes", "tokens"}
_ASIDE |= {"runtime"}
_ASIDE |= {"accuracy_on_training_queries", "gap_closed_on_training_queries"}
# Of zeros in place (stage sparsify), where a model has some; and what they are good for.
ZEROS = Column("zeros", "zeros in matrices", "zeros", lambda v: units.NOTHING if v is None else f"{100 * v:.1f} %")
ZEROS_NOTE = (
    "Zeros in place save neither time nor memory in dense runtimes (transformers, vLLM's dense kernels, llama.cpp). "
    "2:4 can be faster with sparse kernels on NVIDIA GPUs since Ampere. Structured cuts (stage prune) are smaller and "
    "faster everywhere."
)
# Of keys and values, where it differs between models.
CACHE = Column("cache_bytes_per_token", "cache bytes per token", "cache\nB/tok", units.si)
# Of exports: what a weight takes with its scales, and what the figures were measured by.
BITS = Column("bits_per_weight", "bits per weight", "bits/\nweight", _fixed(2))
RUNTIME = Column("runtime", "measured by", "by", lambda value: units.NOTHING if value is None else str(value))
FIELDS = ("stage", "path", *(column.key for column in COLUMNS))


@dataclass(frozen=True)
class Artifact:
    """A finished stage's folder: its manifest, and its curves as (step, nats) points."""

    name: str
    folder: Path
    manifest: Json
    training: list[chart.Point]
    validation: list[chart.Point]


def write_report(run_dir: Path) -> Json:
    """Write report.json, report.md and report.html into `run_dir` and return what report.json holds.

    A stage that was made again after it was measured appears unmeasured: an old figure is not passed off as the
    new folder's. Raises Refusal where a manifest is not JSON.
    """
    artifacts = _artifacts(run_dir)
    report = _report(artifacts)
    page = _page(run_dir, artifacts, report)
    _publish(run_dir / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    _publish(run_dir / "report.md", _markdown(page))
    _publish(run_dir / "report.html", _html(page | {"plots": _plots(artifacts, report)}))
    return report


def table(report: Json) -> Table:
    """The rows for a terminal, the comparisons below them."""
    columns = _columns(report["rows"])
    if any(column in (*TASK_COLUMNS, ZEROS, CACHE, BITS) for column in columns):
        columns = [column for column in columns if column.key not in _ASIDE]
    result = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption_justify="left")
    result.add_column("stage", style="bold", overflow="fold")
    for column in columns:
        result.add_column(column.short, justify="right")
    for row in report["rows"]:
        # Text, not str: a stage called [red] is a name, not a colour
        result.add_row(Text(row["stage"]), *(Text(column.show(row.get(column.key))) for column in columns))
    if below := [*_notes(report["rows"]), *(_sentence(comparison) for comparison in report["comparisons"])]:
        result.caption = Text("\n".join(below))
    return result


# --- reading -------------------------------------------------------------------------------------------------------


def _artifacts(run_dir: Path) -> list[Artifact]:
    """The finished stages: parents before children, otherwise in the order the evaluation lists them."""
    found = {}
    for path in sorted(run_dir.glob("*/manifest.json")):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise Refusal(f"{path} is not JSON ({error}): delete that folder and run its stage again") from None
        if manifest["stage"] == path.parent.name:  # a folder still being written aside has another name
            curves = _curves(path.parent / METRICS)
            found[path.parent.name] = Artifact(path.parent.name, path.parent, manifest, *curves)
    rows = [
        row["stage"] for a in found.values() if a.manifest["kind"] == "results" for row in a.manifest["metrics"]["rows"]
    ]
    ordered: dict[str, Artifact] = {}
    pending = [name for name in rows if name in found] + list(found)

    def place(name: str) -> None:
        if name in found:
            artifact = found.pop(name)
            for parent in _parents(artifact.manifest).values():
                place(Path(parent["path"]).name)
            ordered[name] = artifact

    for name in pending:
        place(name)
    return list(ordered.values())


def _parents(manifest: Json) -> Json:
    return manifest.get("parents") or {}


def _curves(path: Path) -> tuple[list[chart.Point], list[chart.Point]]:
    """Training and validation points; a torn line of a killed run and a loss that is not a number are left out."""
    curves: dict[str, list[chart.Point]] = {"loss": [], "validation_loss": []}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        for key, points in curves.items():
            if isinstance(values.get(key), int | float) and math.isfinite(values[key]):
                points.append((float(values["step"]), float(values[key])))
    return curves["loss"], curves["validation_loss"]


def _report(artifacts: Sequence[Artifact]) -> Json:
    by_name = {artifact.name: artifact for artifact in artifacts}
    rows: dict[tuple[str, str], Json] = {}
    comparisons: list[Json] = []
    for results in (a.manifest for a in artifacts if a.manifest["kind"] == "results"):
        parents, replaced = _parents(results), set()
        for row in results["metrics"]["rows"]:
            owner = row["stage"].partition("/")[0]  # export/gptq is of the stage export
            artifact = by_name.get(owner)
            measured = parents.get(owner, {}).get("content_hash")
            if artifact and measured and measured != artifact.manifest["content_hash"]:
                replaced.add(row["stage"])
                continue
            known = rows.setdefault((row["stage"], row["path"]), dict.fromkeys(FIELDS))
            # a second evaluation may add what the first did not measure, and contradicts nothing
            known.update({key: value for key, value in row.items() if known.get(key) is None})
        comparisons += [
            comparison
            for comparison in results["metrics"].get("comparisons", [])
            if not {comparison["stage"], comparison["against"]} & replaced and comparison not in comparisons
        ]
    measured_stages = {stage for stage, _ in rows}
    for artifact in artifacts:
        if artifact.manifest["kind"] == "model" and artifact.name not in measured_stages:
            rows[artifact.name, str(artifact.folder)] = _unmeasured(artifact)
        for form, told in (
            artifact.manifest["metrics"]["formats"].items() if artifact.manifest["kind"] == "exports" else ()
        ):
            if (name := f"{artifact.name}/{form}") not in measured_stages:
                rows[name, str(artifact.folder / form)] = dict.fromkeys(FIELDS) | {
                    "stage": name,
                    "path": str((artifact.folder / form).resolve()),
                    "parameters": artifact.manifest["metrics"]["parameters"],
                    **{column.key: told[column.key] for column in (*COLUMNS, BITS) if column.key in told},
                }
    return {"rows": _finite(list(rows.values())), "comparisons": _finite(comparisons)}


def _unmeasured(artifact: Artifact) -> Json:
    manifest = artifact.manifest
    files = manifest["files"]
    return dict.fromkeys(FIELDS) | {
        "stage": artifact.name,
        "path": str(artifact.folder.resolve()),
        "parameters": manifest.get("metrics", {}).get("parameters"),
        "bytes": sum(file["bytes"] for name, file in files.items() if name not in (*BESIDE, GRID) and "/" not in name),
        "seconds": manifest.get("seconds"),
        "tokens": manifest.get("tokens"),
        **({} if (bits := manifest.get("metrics", {}).get(BITS.key)) is None else {BITS.key: bits}),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- showing -------------------------------------------------------------------------------------------------------


def _columns(rows: Sequence[Json]) -> list[Column]:
    """The report's own columns, then whatever else the rows bring (accuracy, bits_per_weight, ...)."""
    extra = dict.fromkeys(key for row in rows for key in row if key not in FIELDS)
    task = [column for column in TASK_COLUMNS if extra.pop(column.key, 0) is None]
    own = {column.key: column for column in (ZEROS, CACHE, BITS, RUNTIME) if extra.pop(column.key, 0) is None}
    return [
        *COLUMNS,
        *([CACHE] if len({row[CACHE.key] for row in rows if row.get(CACHE.key)}) > 1 else []),
        *([ZEROS] if _notes(rows) else []),
        *(column for column in (BITS, RUNTIME) if column.key in own),
        *task,
        *(Column(key, key.replace("_", " "), key.replace("_", " "), _plain) for key in extra),
    ]


def _notes(rows: Sequence[Json]) -> list[str]:
    """What a reader of the table could take wrongly."""
    return [ZEROS_NOTE] if any(row.get(ZEROS.key) for row in rows) else []


def _plain(value: Any) -> str:
    if not isinstance(value, float):
        return units.NOTHING if value is None else str(value)
    return f"{value:.2e}" if 0 < abs(value) < 0.001 else units.score(value)


def _sentence(comparison: Json) -> str:
    return (
        f"{comparison['stage']} {units.score(comparison['perplexity'])} against {comparison['against']} "
        f"{units.score(comparison['against_perplexity'])}: {units.percent(comparison['relative'])}"
    )


def _page(run_dir: Path, artifacts: Sequence[Artifact], report: Json) -> Json:
    """What both the Markdown and the HTML say, as text."""
    columns = _columns(report["rows"])
    manifests = {artifact.name: artifact.manifest for artifact in artifacts}
    cost = [
        (name, _plain(m.get("steps")), units.si(m.get("tokens")), units.duration(m.get("seconds")), _speed(m))
        for name, m in manifests.items()
    ]
    return {
        "run": run_dir.resolve().name,
        "headings": ["stage", *(column.heading for column in columns)],
        "rows": [[row["stage"], *(column.show(row.get(column.key)) for column in columns)] for row in report["rows"]],
        "notes": _notes(report["rows"]),
        "comparisons": [
            {
                "sentence": _sentence(comparison),
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
                "parents": [_parent(role, parent, manifests) for role, parent in _parents(manifest).items()],
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


def _markdown(page: Json) -> str:
    def grid(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        rule = ["---", *["---:"] * (len(headings) - 1)]
        return [f"| {' | '.join(line)} |" for line in (headings, rule, *([_md(cell) for cell in row] for row in rows))]

    def lineage(stage: Json) -> str:
        parents = ", ".join(
            f"{_md(parent['role'])} {_md(parent['name'])} `{parent['hash'] or '?'}`".strip()
            + (" (replaced since)" if parent["replaced"] else "")
            for parent in stage["parents"]
        )
        return f"- {_md(stage['stage'])} `{stage['hash']}`" + (f" ← {parents}" if parents else "")

    lines = [f"# {_md(page['run'])}", "", *grid([_md(h) for h in page["headings"]], page["rows"]), ""]
    for note in page["notes"]:
        lines += [_md(note), ""]
    if page["comparisons"]:
        lines += ["## Side by side", "", "Test perplexity, lower is better.", ""]
        lines += [f"- {_md(comparison['sentence'])}" for comparison in page["comparisons"]] + [""]
    lines += ["## Lineage", "", *map(lineage, page["lineage"]), ""]
    lines += ["## Cost", "", *grid(["stage", "steps", "tokens", "time", "tokens/s"], page["cost"]), ""]
    lines += [f"{page['total']} in all.", "", "## Environment", ""]
    lines += [f"- {_md(key)}: {_md(value)}" for key, value in page["environment"]]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Literal text in Markdown, also inside a table cell."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))


def _html(page: Json) -> str:
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # everything a user named is escaped unless it is a chart's Markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("report.html.j2").render(page)


# --- plots ---------------------------------------------------------------------------------------------------------


def _plots(artifacts: Sequence[Artifact], report: Json) -> list[Json]:
    """Figures for the page: the trade-off, validation of all stages together, each stage's training."""
    # a stage has one colour in all of them
    colours = {
        name: i
        for i, name in enumerate(
            dict.fromkeys(
                [a.name for a in artifacts if a.training or a.validation] + [row["stage"] for row in report["rows"]]
            )
        )
    }
    plots = []
    if sized := [row for row in report["rows"] if row["bytes"] and row["perplexity"]]:
        plots.append(_trade_off(sized, colours))
    if len(checked := [a for a in artifacts if a.validation]) > 1:
        lines = [chart.Series(a.name, a.validation, colours[a.name], emphasis=True) for a in checked]
        plots.append(
            _loss_figure("validation", "Validation loss", lines, "comparable between stages with one tokenizer")
        )
    for n, a in enumerate(artifacts):
        lines = []
        if a.training:
            lines.append(chart.Series("training", _thinned(a.training), colours[a.name]))
        if a.validation:
            lines.append(chart.Series("validation", a.validation, colours[a.name], emphasis=True))
        if lines:
            plots.append(
                _loss_figure(f"loss-{n}", f"{a.name}: loss", lines, "training loss is this stage's own objective")
            )
    return plots


def _loss_figure(name: str, title: str, lines: Sequence[chart.Series], note: str) -> Json:
    ends = "; ".join(
        f"{line.label} from {line.points[0][1]:.2f} at step {line.points[0][0]:.0f} "
        f"to {line.points[-1][1]:.2f} at step {line.points[-1][0]:.0f}"
        for line in lines
    )
    picture = chart.line_chart(
        lines, name=name, title=title, description=ends, x_label="optimizer step", y_label="nats per token"
    )
    return _figure(title, picture, ends, note)


def _trade_off(rows: Sequence[Json], colours: dict[str, int]) -> Json:
    title = "Size and quality"
    points = [chart.Dot(row["stage"], row["bytes"], row["perplexity"], colours[row["stage"]]) for row in rows]
    text = "; ".join(f"{dot.label}: {units.size(dot.x)}, perplexity {units.score(dot.y)}" for dot in points)
    picture = chart.point_chart(
        points,
        name="trade-off",
        title=title,
        description=text,
        x_label="bytes on disk",
        y_label="test perplexity",
        x_format=units.size,
    )
    return _figure(title, picture, text, "lower left is better")


def _figure(title: str, picture: Markup, text: str, note: str) -> Json:
    return {"title": title, "picture": picture, "text": text, "note": note}


def _thinned(points: Sequence[chart.Point]) -> list[chart.Point]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    width = math.ceil(len(points) / MOST_POINTS) or 1
    groups = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _publish(path: Path, text: str) -> None:
    """Written aside and renamed, so that a reader never sees half a report."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
