"""Which columns of a source are read: the text or the conversations, and the weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.data.locations import EMBEDDED, Location
from pipeline.data.readers import column_names


@dataclass(frozen=True)
class Columns:
    """data.text_column, data.messages_column and data.weight_column."""

    text: str
    messages: str | None  # None: a column `messages` or `conversations`, if there is one
    weight: str | None

    def chosen(self, columns: Collection[str], where: str) -> tuple[str, bool]:
        """The column to read, and whether it holds conversations."""
        for name in [self.messages] if self.messages else ["messages", "conversations"]:
            if name in columns:
                return name, True
        if not self.messages and self.text in columns:
            return self.text, False
        key = "messages_column" if self.messages else "text_column"
        found = ", ".join(columns) or "nothing"
        name = next(filter(columns.__contains__, ("conversations", "messages")), "") if self.messages else ""
        remedy = f"; set data.{key}={name}" if name else ""
        raise Refusal(f"{where}: data.{key}={self.messages or self.text} is no column of it; it has {found}{remedy}")

    def with_weight(self, column: str, columns: Iterable[str], where: str) -> list[str]:
        """The columns to read: the one of text or messages, and the weight's if one is named."""
        if self.weight is None:
            return [column]
        if self.weight not in columns or self.weight == column:
            found = ", ".join(name for name in columns if name != column) or "nothing"
            raise Refusal(
                f"{where}: data.weight_column={self.weight} is no column of numbers; beside {column} it has {found}"
            )
        return [column, self.weight]

    def check_weighable(self, location: Location) -> None:
        """Refuse a weight's column where there is none."""
        if self.weight is None:
            return
        if location.kind in EMBEDDED or any(path.suffix == ".txt" for path in location.files):
            raise Refusal(
                f"{location.label}: it has no columns, so no data.weight_column={self.weight}; set it to null"
            )
        for path in location.files:
            columns = column_names(path)
            self.with_weight(self.chosen(columns, str(path))[0], columns, str(path))

    def is_chat(self, path: Path) -> bool:
        """Whether a file holds conversations."""
        if path.suffix == ".txt" and self.messages:
            raise Refusal(f"{path}: a .txt file has no column data.messages_column={self.messages}; set it to null")
        return path.suffix != ".txt" and self.chosen(column_names(path), str(path))[1]


def weight_of(value: Any, where: str) -> float:
    """A weight as it stands in a column or a message."""
    # Beyond 1e9 no weight is meant, and float32 could not hold what a document's and a message's make together.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise Refusal(f"{where}: has weight {str(value)[:40]}; need a number from 0 to 1e9, 1 for what counts as usual")
    return float(value)
