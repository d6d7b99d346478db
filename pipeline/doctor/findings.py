"""What the doctor has found, and how it is said. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

Verdict = Literal["ok", "failed", "warning", "skipped"]
_ORDER: tuple[Verdict, ...] = ("skipped", "ok", "warning", "failed")
_COLOURS = {"ok": "green", "failed": "bold red", "warning": "yellow", "skipped": "dim"}


@dataclass(frozen=True)
class Finding:
    check: str
    verdict: Verdict
    measured: str  # with units; of a check that was skipped, why
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def finding(check: str, fine: bool, measured: str, remedy: str) -> Finding:
    return Finding(check, "ok" if fine else "failed", measured, "" if fine else remedy)


def skipped(check: str, why: str) -> Finding:
    return Finding(check, "skipped", why)


def worst(of_ranks: Sequence[Finding]) -> Finding:
    """Of one check on every rank; the rank that found the worst is named."""
    at = max(range(len(of_ranks)), key=lambda rank: _ORDER.index(of_ranks[rank].verdict))
    found = of_ranks[at]
    if found.verdict in ("ok", "skipped") or len(of_ranks) == 1:
        return of_ranks[0] if found.verdict == of_ranks[0].verdict else found
    return Finding(found.check, found.verdict, f"rank {at}: {found.measured}", found.remedy)


def table(found: Sequence[tuple[str, Finding]]) -> Table:
    """Of (stage, finding)."""
    result = Table(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False)
    for column in ("stage", "check", "verdict", "measured", "remedy"):
        result.add_column(column, overflow="fold")
    for stage, each in found:
        verdict = Text(each.verdict, style=_COLOURS[each.verdict])
        result.add_row(Text(stage), each.check, verdict, Text(each.measured), Text(each.remedy))
    return result
