"""The report as a table for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report.columns import BITS, CACHE, TASK_COLUMNS, ZEROS, columns_of, notes_on
from pipeline.report.page import sentence, short_verdicts

Json = dict[str, Any]

# Left out where further columns need the room; the page shows all.
_ASIDE = {"bits_per_byte", "prefill_tokens_per_second", "first_token_ms", "peak_memory_bytes", "tokens"}
_ASIDE |= {"runtime"}
_ASIDE |= {"accuracy_on_training_queries", "gap_closed_on_training_queries"}


def table(report: Json) -> Table:
    """The rows for a terminal, the comparisons below them."""
    columns = [column for column in columns_of(report["rows"]) if not column.key.endswith("_interval")]
    if any(column in (*TASK_COLUMNS, ZEROS, CACHE, BITS) for column in columns):
        columns = [column for column in columns if column.key not in _ASIDE]
    result = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, caption_justify="left")
    result.add_column("stage", style="bold", overflow="fold")
    for column in columns:
        result.add_column(column.short, justify="right")
    for row in report["rows"]:
        # Text, not str: a stage called [red] is a name, not a colour
        result.add_row(Text(row["stage"]), *(Text(column.show(row.get(column.key))) for column in columns))
    if below := [*notes_on(report["rows"]), *short_verdicts(report), *map(sentence, report["comparisons"])]:
        result.caption = Text("\n".join(below))
    return result
