"""Whether a model is as good as its reference, on the same documents and the same questions; in a sentence each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from models.certainty import LEVEL, Compared, compare_answers, compare_texts, perplexity_interval
from models.errors import Refusal

Json = dict[str, Any]
REQUIRED = ("equivalent",)
TEXT = "document"


@dataclass(frozen=True)
class Margin:
    """Differences that do not matter."""

    perplexity: float = 0.01  # a share of the reference's
    accuracy: float = 0.01  # of 1: a point of a hundred

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (isinstance(value, int | float) and 0 < value < 1):
                raise Refusal(f"verdict.margin.{name}={value}: need a number between 0 and 1; 0.01 is 1 %")


@dataclass(frozen=True)
class Rule:
    """conf/config.yaml, `verdict`."""

    margin: Margin = field(default_factory=Margin)
    reference: str | None = None  # a stage, or a folder's name; None: the teacher, model.path, or what was made first
    require: str | None = None  # of REQUIRED

    def __post_init__(self) -> None:
        if self.require is not None and self.require not in REQUIRED:
            raise Refusal(f"verdict.require={self.require}: need equivalent, or null")


@dataclass(frozen=True)
class Scored:
    """What a model's figures are made of."""

    nats_D: np.ndarray  # of each document
    tokens_D: np.ndarray
    right: Mapping[str, bool]  # by question
    unit: str = TEXT  # what a document is

    @classmethod
    def of(cls, measured: Json, right: Mapping[str, bool]) -> Scored:
        """Takes the figures of documents out of a row of the report, and puts the interval in."""
        nats_D, tokens_D = (np.array(measured.pop(name), dtype=np.float64) for name in ("nats_D", "tokens_D"))
        measured["perplexity_interval"] = _known(perplexity_interval(nats_D, tokens_D))
        measured["documents"] = len(nats_D)
        return cls(nats_D, tokens_D, right, measured.pop("unit"))

    def on_the_same(self, other: Scored) -> bool:
        """Whether both read the same documents. Of texts these are in one order whatever the tokenizer; windows, and
        conversations that a limit of tokens leaves out, are others with another tokenizer."""
        if len(self.nats_D) != len(other.nats_D) or len(self.nats_D) < 2:
            return False
        return self.unit == other.unit == TEXT or np.array_equal(self.tokens_D, other.tokens_D)


def relative_interval(model: Scored, reference: Scored) -> tuple[float, float] | None:
    """Of the relative difference of perplexity; None where they were measured on other documents."""
    if not model.on_the_same(reference):
        return None
    return _known(compare_texts(model.nats_D, reference.nats_D, reference.tokens_D, Margin().perplexity).interval)


def _known(interval: tuple[float, float]) -> tuple[float, float] | None:
    return interval if math.isfinite(interval[0]) and math.isfinite(interval[1]) else None


def verdict_on(stage: str, model: Scored, against: str, reference: Scored, margin: Margin) -> Json:
    found: dict[str, Compared] = {}
    if model.on_the_same(reference):
        found["perplexity"] = compare_texts(model.nats_D, reference.nats_D, reference.tokens_D, margin.perplexity)
    asked = [question for question in model.right if question in reference.right]
    if asked:
        ours, theirs = (np.array([each.right[question] for question in asked]) for each in (model, reference))
        found["accuracy"] = compare_answers(ours, theirs, margin.accuracy)
    if not found:
        sizes = [f"{len(each.nats_D):,} {_plural(each.unit)}" for each in (model, reference)]
        told = f"{stage} cannot be compared with {against}: it was measured on {sizes[0]}, and {against} on {sizes[1]}"
        return {"stage": stage, "against": against, "verdict": "undecided", "sentence": told}
    verdict = _of_all([each.verdict for each in found.values()])
    other = "" if "perplexity" in found else "; perplexity was measured on other documents"
    units = {"perplexity": model.unit, "accuracy": "question"}
    parts = [_part(name, each, getattr(margin, name), units[name]) for name, each in found.items()]
    return {
        "stage": stage,
        "against": against,
        "verdict": verdict,
        "sentence": f"{stage} {_SAID[verdict]} {against}: {'; '.join(parts)}{other}",
        **{name: _told(each) for name, each in found.items()},
    }


def _told(found: Compared) -> Json:
    return asdict(found) | {"interval": _known(found.interval), "inner": _known(found.inner)}


_SAID = {
    "equivalent": "is equivalent to",
    "better": "is better than",
    "worse": "is worse than",
    "undecided": "cannot yet be told from",
}


def _of_all(verdicts: Sequence[str]) -> str:
    """Of perplexity and accuracy together: worse in one is worse, and a model is better where it is nowhere worse."""
    for verdict in ("worse", "undecided", "better"):
        if verdict in verdicts:
            return verdict
    return "equivalent"


def _part(name: str, found: Compared, margin: float, unit: str) -> str:
    sign, share = (" %", " %") if name == "perplexity" else (" points", "")
    low, high = (_signed(100 * each) for each in found.interval)
    told = f"{name} {_signed(100 * found.difference)}{sign} "
    if _known(found.interval) is None:
        told += f"on {found.units:,} {_plural(unit)}, which are too few"
    else:
        told += f"({100 * LEVEL:.0f} %: {low} to {high}; margin ±{100 * margin:g}{share}) "
        told += f"on {found.units:,} {_plural(unit)}"
    told += f", McNemar p={found.p:.2g}" if found.p is not None else ""
    if found.needed is not None:
        told += f"; about {found.needed:,} would decide"
    return told


def _plural(unit: str) -> str:
    noun, of, size = unit.partition(" of ")
    return f"{noun}s{of}{size}"


def _signed(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "−∞" if value < 0 else "+∞"
    return f"{value:+.2f}".replace("-", "−")
