"""Packed sequences that are made up, and held in memory; read as pipeline.data.sequences.Sequences is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.data.flat import Array


class Rows(list[dict[str, Any]]):
    """Dictionaries of lists, each a sequence."""

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    @property
    def lengths(self) -> Array:
        return np.array([len(row["input_ids"]) for row in self], dtype=np.int64)

    @property
    def counts(self) -> Array:
        return np.array([row["weight"] if "weight" in row else row["supervised"] for row in self])

    def arrays(self, number: int) -> dict[str, Any]:
        return self[number]

    def flat(self, first: int, stop: int) -> tuple[dict[str, Array], Array]:
        names = ("input_ids", "position_ids", "targets")
        return {name: np.concatenate([row[name] for row in self[first:stop]]) for name in names}, self.lengths[
            first:stop
        ]

    def select(self, numbers: Sequence[int]) -> Rows:
        return Rows(self[number] for number in numbers)

    def add_column(self, name: str, values: Sequence[Any]) -> Rows:
        return Rows({**row, name: value} for row, value in zip(self, values, strict=True))
