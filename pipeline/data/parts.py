"""Text in parts, each of which is read by itself: they become the shards of a folder of packed sequences.

Where a part begins and ends depends on the text alone, never on who reads it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.data.tables import empty_documents

if TYPE_CHECKING:
    from datasets import Dataset

PART_BYTES = 2**26  # of text in a part: a quarter of a minute of one core's work, which a killed run loses
_BATCH_BYTES = 2**22  # of documents, tokenized together: tokens with their places take 100 times the memory
_BATCH_DOCUMENTS = 2000


@dataclass(frozen=True)
class Batch:
    """Some documents: texts, or conversations."""

    contents: list[Any]
    weights: list[float]
    places: list[str]  # where each stands, for messages


class Parts(ABC):
    """The documents of a split. What it is made of goes to other processes."""

    chat: bool  # conversations
    spread: bool  # other processes can read it as well as this one

    @abstractmethod
    def __len__(self) -> int:
        """Of parts; one at least."""

    @abstractmethod
    def batches(self, number: int, found: Counter[str]) -> Iterator[Batch]:
        """The documents of a part in their order; `documents` and `empty` (which are left out) are counted."""

    @abstractmethod
    def check(self, found: Counter[str]) -> None:
        """Refuse what only shows when all parts are read: `found` is what was counted of all."""


class RowParts(Parts):
    """A datasets.Dataset with a column `text` or `messages`, and perhaps `weight`."""

    spread = False

    def __init__(self, documents: Dataset) -> None:
        self.documents = documents
        self.chat = "messages" in documents.column_names
        each = documents.data.nbytes / max(1, len(documents.data))
        self._part, self._batch = (max(1, int(size / max(1, each))) for size in (PART_BYTES, _BATCH_BYTES))

    def __len__(self) -> int:
        return max(1, -(-len(self.documents) // self._part))

    def batches(self, number: int, found: Counter[str]) -> Iterator[Batch]:
        column, kind = ("messages", "conversation") if self.chat else ("text", "text")
        if number == 0:
            found["empty"] += empty_documents(self.documents)
        stop = min(len(self.documents), (number + 1) * self._part)
        batch = min(self._batch, _BATCH_DOCUMENTS)
        for first in range(number * self._part, stop, batch):
            rows = self.documents[first : min(stop, first + batch)]
            contents = rows[column]
            found["documents"] += len(contents)
            weights = rows.get("weight") or [1.0] * len(contents)
            yield Batch(contents, weights, [f"{kind} {first + at}" for at in range(len(contents))])

    def check(self, found: Counter[str]) -> None:
        """Whoever made the dataset has looked at it."""


def batched(documents: Iterator[tuple[str, Any, float]], found: Counter[str]) -> Iterator[Batch]:
    """Of documents that come one by one, as (place, content, weight)."""
    places: list[str] = []
    contents: list[Any] = []
    weights: list[float] = []
    size = 0
    for place, content, weight in documents:
        places.append(place)
        contents.append(content)
        weights.append(weight)
        size += len(content) if isinstance(content, str) else sum(len(str(message)) for message in content)
        if size >= _BATCH_BYTES or len(places) == _BATCH_DOCUMENTS:
            found["documents"] += len(places)
            yield Batch(contents, weights, places)
            places, contents, weights, size = [], [], [], 0
    if places:
        found["documents"] += len(places)
        yield Batch(contents, weights, places)
