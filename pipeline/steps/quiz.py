"""A task's queries as the questions that the stage `evaluate` asks models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.load import load_config
from models.measure import Quiz
from models.questions import Question
from pipeline.data.batch import pad_token
from pipeline.data.tasks import Task
from pipeline.steps.accuracy import SEEN, SHOWN, SHOWN_SEEN, UNSEEN

_LEFT_OUT = ("too_long", "demonstrations_left_out", "across")


def quiz_of(
    task: Task, tokenizer: Any, *, role: str, shown: bool, queries: int, batch_size: int, choices_per: str
) -> Quiz:
    """The task's queries, at most so many of each split; `shown`: also behind the teacher's demonstrations.

    What does not fit is counted and reported; `role` is for that line. Raises Refusal where no query fits.
    """
    questions: dict[str, list[Question]] = {}
    counts: Counter[str] = Counter()
    for split, plain, behind in (("test", UNSEEN, SHOWN), ("train", SEEN, SHOWN_SEEN)):
        both = task.questions(split, tokenizer, queries, counts)
        questions[plain] = [one for one, _ in both]
        if shown:
            questions[behind] = [other for _, other in both]
    if not questions[UNSEEN]:
        raise Refusal(f"task.test: none of its queries fits ({dict(counts)}); raise task.max_length")
    if left_out := ", ".join(
        f"{name.replace('_', ' ')} {n:,}" for name, n in counts.items() if n and name in _LEFT_OUT
    ):
        print(f"{role}: of the task's queries: {left_out}", flush=True)
    return Quiz(questions, tokenizer, pad_token(tokenizer), task.separator, batch_size, choices_per)


def check_room(task: Task, role: str, folder: str, shown: bool, trust_remote_code: bool) -> None:
    """Whether the task's prompts and answers fit what a model reads; one that is not planned is not known yet."""
    if not (Path(folder) / "config.json").is_file():
        return
    limit = getattr(load_config(folder, role, trust_remote_code), "max_position_embeddings", None)
    for name in ("max_length", *(("teacher_max_length",) if shown and task.teacher_prompts else ())):
        if limit is not None and getattr(task, name) > limit:
            raise Refusal(
                f"task.{name}={getattr(task, name)}: {role} reads at most {limit} tokens (max_position_embeddings)"
            )
