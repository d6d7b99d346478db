"""The report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


def as_markdown(page: Json) -> str:
    """`page` as `page_of` gives it."""

    def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
        rule = ["---", *["---:"] * (len(headings) - 1)]
        return [f"| {' | '.join(line)} |" for line in (headings, rule, *([_md(cell) for cell in row] for row in rows))]

    def lineage(stage: Json) -> str:
        parents = ", ".join(
            f"{_md(parent['role'])} {_md(parent['name'])} `{parent['hash'] or '?'}`".strip()
            + (" (replaced since)" if parent["replaced"] else "")
            for parent in stage["parents"]
        )
        known = f" `{stage['hash']}`" if stage["hash"] else ""
        return f"- {_md(stage['stage'])}{known}" + (f" ← {parents}" if parents else "")

    lines = [f"# {_md(page['run'])}", "", *table([_md(h) for h in page["headings"]], page["rows"]), ""]
    for note in page["notes"]:
        lines += [_md(note), ""]
    if page["verdicts"]:
        lines += ["## Verdict", ""]
        lines += [f"- **{each['verdict']}**: {_md(each['sentence'])}" for each in page["verdicts"]] + [""]
    if page["comparisons"]:
        lines += ["## Side by side", "", "Test perplexity, lower is better.", ""]
        lines += [f"- {_md(comparison['sentence'])}" for comparison in page["comparisons"]] + [""]
    lines += ["## Lineage", "", *map(lineage, page["lineage"]), ""]
    lines += ["## Cost", "", *table(["stage", "steps", "tokens", "time", "tokens/s"], page["cost"]), ""]
    lines += [f"{page['total']} in all.", "", "## Environment", ""]
    lines += [f"- {_md(key)}: {_md(value)}" for key, value in page["environment"]]
    return "\n".join(lines) + "\n"


def _md(text: str) -> str:
    """Literal text in Markdown, also inside a table cell."""
    return re.sub(r"([\\`*<>|\[\]])", r"\\\1", " ".join(text.split()))
