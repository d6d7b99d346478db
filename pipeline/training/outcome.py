"""Whether a training went anywhere: what its own figures say against it, for the manifest and the report."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

_GROWN = 1.25  # the loss of single batches goes up and down by less
_GUESSING = 1.05  # of ln V: fresh weights begin a little above it
_ENOUGH = 5  # logged steps, before a loss is compared with its start


def doubt(metrics: Path, vocabulary: int) -> str | None:
    """A sentence where the loss ended above its start, or the cross-entropy above that of guessing; else None.

    `metrics`: the training's metrics.jsonl, losses in nats per token; the ends are medians over a tenth of its lines.
    """
    lines = _lines(metrics)
    losses = [line["loss"] for line in lines if _is_number(line.get("loss"))]
    if len(losses) >= _ENOUGH and losses[0] > 0 and (end := _end(losses)) > _GROWN * losses[0]:
        return f"the loss rose from {losses[0]:.3g} to {end:.3g}: it diverged; lower the learning rate"
    for name in ("cross_entropy", "validation_loss"):
        values = [line[name] for line in lines if _is_number(line.get(name))]
        if values and (end := _end(values)) > _GUESSING * math.log(vocabulary):
            return (
                f"the {name.replace('_', ' ')} ended at {end:.3g} nats, and guessing among {vocabulary:,} tokens gives "
                f"{math.log(vocabulary):.3g}: nothing was learnt; train longer, or lower the learning rate"
            )
    return None


def _lines(metrics: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _end(values: Sequence[float]) -> float:
    return float(median(values[-max(1, len(values) // 10) :]))
