"""Which documents belong to a split: those of its own source, or those of train whose hash says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from models.errors import Refusal
from pipeline.data.conversations import Conversation
from pipeline.data.reading import Document


@dataclass(frozen=True)
class Split:
    name: str
    label: str  # of the source it is read from, for messages
    held_out: bool  # taken out of train
    given: frozenset[str]  # splits that have a source of their own
    holdout: float  # share of train, for each split that has none
    most: int | None  # documents

    @property
    def drawn(self) -> bool:
        """Whether a document's hash decides; not of what is given beside train."""
        return self.name == "train" or self.held_out

    def of(self, digest: bytes) -> str:
        """The split of a document of train: test and validation own fixed ranges of the hash, unless given."""
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        if fraction < self.holdout:
            return "train" if "test" in self.given else "test"
        if fraction < 2 * self.holdout:
            return "train" if "validation" in self.given else "validation"
        return "train"

    def check_some(self, read: int, kept: int) -> None:
        """Refuse a split of which nothing is left, of so many documents."""
        if not kept and self.held_out and self.holdout:
            raise NoDocuments(
                f"{self.label}: none of its {read} documents falls to {self.name}; give data.{self.name}, a larger "
                "data.holdout (0 does without) or, of a .txt file, data.sample_by=paragraph"
            )
        if not kept and not self.held_out:
            raise NoDocuments(
                f"{self.label}: none of its {read} documents has text for {self.name}; give another source"
            )


class NoDocuments(Refusal):
    """A split has none. What is wrong with its files is another Refusal."""


@dataclass
class Tally:
    read: int = 0
    kept: int = 0
    empty: int = 0
    digest: Any = field(default_factory=hashlib.sha256)  # of the kept documents, in order


def chosen(split: Split, read: Iterable[Document], tally: Tally) -> Iterator[Document]:
    """The documents of the split; counted and hashed on the way."""
    for where, value, weight in read:
        if tally.kept == split.most:
            return
        tally.read += 1
        content = value if isinstance(value, str) else _unweighted(value)
        try:
            digest = hashlib.sha256(content.encode()).digest()
        except UnicodeEncodeError as error:
            raise Refusal(f"{where}: holds half a surrogate pair, which is no text; mend or drop it") from error
        if split.drawn and split.of(digest) != split.name:
            continue
        if not value or (isinstance(value, str) and value.isspace()):
            tally.empty += 1
            continue
        tally.kept += 1
        tally.digest.update(digest)
        yield where, value, weight


def _unweighted(messages: Conversation) -> str:
    """What the split of a conversation depends on: a copy that only weighs otherwise falls to the same."""
    plain = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    return json.dumps(plain, ensure_ascii=False, sort_keys=True)
