"""The report as one HTML page that needs no other file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

Json = dict[str, Any]


def as_html(page: Json) -> str:
    """`page` as `page_of` gives it, with the `plots` of `plots_of`."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # everything a user named is escaped unless it is a chart's Markup
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return templates.get_template("report.html.j2").render(page)
