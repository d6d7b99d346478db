"""How many of a task's queries models answer right, and what share of the teacher's gain from demonstrations a student
has closed."""

from __future__ import annotations

from typing import Any

import numpy as np

from models.certainty import accuracy_interval
from pipeline.data.tasks import Task

UNSEEN, SEEN = "unseen", "seen"  # queries held out, and trained on
SHOWN, SHOWN_SEEN = "unseen, shown", "seen, shown"  # the same behind demonstrations
RESAMPLES = 2000


def with_accuracy(
    rows: list[dict[str, Any]], right: dict[str, dict[str, dict[str, bool]]], teacher: str | None, task: Task
) -> list[dict[str, Any]]:
    """The rows with their accuracies, one more for the teacher with its demonstrations, and the gaps closed.

    `right`: role → kind of question → query → whether it was answered right; `teacher`: its role, where it is measured.
    """
    result = []
    for row in rows:
        told = right[row["stage"]]
        row = {**row, **_sure(told[UNSEEN]), "accuracy_on_training_queries": _mean(told[SEEN])}
        if teacher in right and row["stage"] != teacher:
            row |= gap_closed(told[UNSEEN], right[teacher][UNSEEN], right[teacher][SHOWN])
            seen = gap_closed(told[SEEN], right[teacher][SEEN], right[teacher][SHOWN_SEEN])
            row["gap_closed_on_training_queries"] = seen["gap_closed"]
        result.append(row)
        if row["stage"] == teacher and task.teacher_prompts:
            name = f"{teacher}, {task.shots} shots" if task.shots else f"{teacher}, with context"
            shown = {**_sure(told[SHOWN]), "accuracy_on_training_queries": _mean(told[SHOWN_SEEN])}
            result.append({"stage": name, "path": row["path"], **shown})
    return result


def gap_closed(student: dict[str, bool], without: dict[str, bool], shown: dict[str, bool]) -> dict[str, float | None]:
    """The student's share of what demonstrations add to the teacher's accuracy, with its 95 % bootstrap interval.

    Over the queries that all three were asked; each resample draws queries. None where demonstrations add nothing, and
    for the interval where they add nothing in more than one of forty resamples.
    """
    nothing: dict[str, float | None] = {"gap_closed": None, "gap_closed_low": None, "gap_closed_high": None}
    asked = [query for query in student if query in without and query in shown]
    told = np.array([[each[query] for query in asked] for each in (student, without, shown)], dtype=float)
    if not asked or told[2].mean() <= told[1].mean():
        return nothing
    closed = (told[0] - told[1]).mean() / (told[2] - told[1]).mean()
    draws = np.random.default_rng(0).integers(len(asked), size=(RESAMPLES, len(asked)))
    resampled = told[:, draws].mean(-1)
    gap, gained = resampled[2] - resampled[1], resampled[0] - resampled[1]
    if (gap <= 0).mean() > 0.025:
        return {**nothing, "gap_closed": float(closed)}
    low, high = np.percentile(gained[gap > 0] / gap[gap > 0], [2.5, 97.5])
    return {"gap_closed": float(closed), "gap_closed_low": float(low), "gap_closed_high": float(high)}


def _sure(told: dict[str, bool]) -> dict[str, Any]:
    return {
        "accuracy": _mean(told),
        "accuracy_interval": accuracy_interval(np.array([*told.values()])) if told else None,
    }


def _mean(told: dict[str, bool]) -> float | None:
    return sum(told.values()) / len(told) if told else None
