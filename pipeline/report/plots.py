"""The plots of the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report import chart, units
from pipeline.report.manifests import Artifact

Json = dict[str, Any]

MOST_POINTS = 240  # of one curve; longer ones are averaged, as a page has no more pixels


def plots_of(artifacts: Sequence[Artifact], report: Json) -> list[Json]:
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
