"""Calibration text: samples of the training split, on which a stage gathers statistics of a finished model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import Refusal
from models.targets import IGNORED

Sample = dict[str, list[int]]  # input_ids, position_ids, targets: of one length


@dataclass(frozen=True)
class Calibration:
    """How calibration text is taken from the training split.

    concatenated=True: documents, in an order drawn by the seed, are concatenated and split into samples of `length`
    tokens. False: each sample is the beginning of one packed sequence, drawn by the seed, of `length` tokens at most.
    """

    samples: int
    length: int  # tokens of a sample
    batch_size: int  # samples that the model reads at once
    concatenated: bool

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise Refusal(f"calibration.{name}={getattr(self, name)}: need at least {least}")

    def __str__(self) -> str:
        return f"{self.samples} samples of calibration text"

    def check(self, stage: str, config: Any, corpus: dict[str, Any], longest: int | None = None) -> None:
        """Refuse, before text is read, samples that are longer than the model reads, and more text than there can be.

        `corpus` is what `check_source` says; `longest`: of the packed sequences.
        """
        length = min(self.length, longest or self.length)
        limit = getattr(config, "max_position_embeddings", None)
        if limit and limit < length:
            raise Refusal(
                f"{stage}.calibration.length={length}: the model reads at most {limit} tokens "
                f"(max_position_embeddings); use {stage}.calibration.length={limit}"
            )
        most = (corpus.get("train") or {}).get("tokens_at_most")
        if self.concatenated and most is not None and not corpus["chat"] and most < self.samples * self.length:
            raise self._too_short(stage, f"{most:,} at most")

    def take(self, stage: str, sequences: Any, draw: np.random.Generator) -> list[Sample]:
        """The samples, from the sequences of a split. Not concatenated there can be fewer than were asked for; none is
        of a sequence without a token to predict. Raises Refusal where there is not enough text."""
        order = draw.permutation(len(sequences))
        return self._concatenated(stage, sequences, order) if self.concatenated else self._beginnings(sequences, order)

    def _concatenated(self, stage: str, sequences: Any, order: Iterable[int]) -> list[Sample]:
        ids: list[int] = []
        targets: list[int] = []
        for number in order:
            sequence = sequences[int(number)]
            ids += sequence["input_ids"]
            targets += sequence["targets"]
            if len(ids) >= self.samples * self.length:
                break
        else:
            raise self._too_short(stage, f"{len(ids):,}")
        starts = range(0, self.samples * self.length, self.length)
        return [
            {
                "input_ids": ids[start : start + self.length],
                "position_ids": list(range(self.length)),
                "targets": targets[start : start + self.length],
            }
            for start in starts
        ]

    def _beginnings(self, sequences: Any, order: Iterable[int]) -> list[Sample]:
        found: list[Sample] = []
        for number in order:
            if len(found) == self.samples:
                break
            if (sample := beginning(sequences[int(number)], self.length)) is not None:
                found.append(sample)
        return found

    def _too_short(self, stage: str, found: str) -> Refusal:
        return Refusal(
            f"{stage}.calibration.samples={self.samples} of calibration.length={self.length}: need "
            f"{self.samples * self.length:,} tokens, and data.train has {found}; take fewer or shorter samples, or "
            f"more text"
        )


def beginning(sequence: dict[str, Any], length: int) -> Sample | None:
    """The first tokens of a sequence; of one whose prompt is longer, those around the first that is to be predicted.
    None where nothing is to be predicted."""
    first = next((at for at, target in enumerate(sequence["targets"]) if target != IGNORED), None)
    if first is None:
        return None
    start = 0 if first < length // 2 else min(first - length // 2, max(0, len(sequence["targets"]) - length))
    return {name: sequence[name][start : start + length] for name in ("input_ids", "position_ids", "targets")}
