"""Demonstrations: which examples a teacher is shown before a query."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.errors import Refusal
from pipeline.data.examples import Example

SELECTIONS = ("fixed", "random", "nearest")


@dataclass(frozen=True)
class Demonstrations:
    """`shots` of a pool: always the same ones, random ones for every query, or those most like the query."""

    pool: list[Example]
    shots: int
    selection: str
    seed: int

    def before(self, example: Example, draw: int) -> list[Example]:
        """The demonstrations before a query, never the query itself."""
        if self.selection == "fixed" or not self.shots:
            return self.pool[: self.shots]
        for tried in (min(len(self.pool), self.shots + 8), len(self.pool)):  # some may be the query itself
            if self.selection == "random":
                order = random_of(self.seed, draw, example.asked).choice(len(self.pool), tried, replace=False)
            else:
                order = _largest(self._vectors @ _vectors([example.query])[0], tried)
            chosen = [self.pool[number] for number in order if self.pool[number].asked != example.asked][: self.shots]
            if len(chosen) == self.shots:
                return chosen[::-1]
        raise Refusal(f"task.shots={self.shots}: task.train has {len(chosen)} other queries to show")

    @cached_property
    def _vectors(self) -> np.ndarray:
        return _vectors([each.query for each in self.pool])


def random_of(seed: int, *given: object) -> np.random.Generator:
    """Random numbers that depend on the seed and on what they are for, whatever was drawn before."""
    digest = hashlib.sha256(json.dumps([seed, *map(str, given)]).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest, the largest first; of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]


def _vectors(texts: list[str]) -> np.ndarray:
    """How often each text has each of its runs of three letters, hashed to 1,024 places, of length 1."""
    found = np.zeros((len(texts), 1024), dtype=np.float32)
    for number, text in enumerate(texts):
        spaced = f"  {text.lower()}  "
        for at in range(len(spaced) - 2):
            code = int.from_bytes(hashlib.blake2b(spaced[at : at + 3].encode(), digest_size=2).digest(), "big")
            found[number, code % 1024] += 1
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)
