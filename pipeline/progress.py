"""A progress bar for stages that do not train; where nobody watches a terminal, a line for every tenth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")


def shown(items: Iterable[T], count: int, what: str, visible: bool = True) -> Iterator[T]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not visible) as progress:
        if not visible or progress.console.is_terminal:
            yield from progress.track(items, total=count, description=what)
            return
        progress.disable = True
        for number, item in enumerate(items):
            if 10 * number // count > 10 * (number - 1) // count:
                print(f"{what}: {number:,} of {count:,}", flush=True)
            yield item
