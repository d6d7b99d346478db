"""How many questions a model answers right: among choices by their likelihood, else by the very text it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from models.generation import Sampling, generate, log_probabilities


@dataclass(frozen=True)
class Question:
    """`prompt` in tokens. `choices`: what it can be answered by, ends included, of which number `right` is right;
    none: the generated text has to be `answer`."""

    prompt: list[int]
    asked: str  # its text
    answer: str
    answer_tokens: int
    choices: list[list[int]] = field(default_factory=list)
    right: int = 0


def answered(
    model: Any, questions: Sequence[Question], tokenizer: Any, pad_token: int, end: str, batch_rows: int
) -> list[bool]:
    """Whether each was answered right, without any sampling. `end`: the text that ends an answer."""
    told: list[bool] = [False] * len(questions)
    chosen = [number for number, question in enumerate(questions) if question.choices]
    pairs = [(questions[number].prompt, choice) for number in chosen for choice in questions[number].choices]
    scores = iter(log_probabilities(model, pairs, pad_token=pad_token, batch_rows=batch_rows))
    for number in chosen:
        sums = [sum(next(scores)) for _ in questions[number].choices]
        told[number] = max(range(len(sums)), key=sums.__getitem__) == questions[number].right
    free = [number for number, question in enumerate(questions) if not question.choices]
    if not free:
        return told
    # A right answer in other tokens than ours may take some more, where the model has room for them.
    longest = 2 * max(questions[number].answer_tokens for number in free)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None:
        longest = max(1, min(longest, limit - max(len(questions[number].prompt) for number in free)))
    answers = generate(
        model,
        [questions[number].prompt for number in free],
        Sampling(max_new_tokens=longest),
        pad_token=pad_token,
        end_tokens=[] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
        stop=[end],
        tokenizer=tokenizer,
        batch_rows=batch_rows,
    )
    for at, (answer, *_) in answers:
        text = tokenizer.decode(answer.ids, skip_special_tokens=True)
        told[free[at]] = text.split(end)[0].strip() == questions[free[at]].answer.strip()
    return told
