"""How many questions a model answers right: among choices by their likelihood, else by the very text it generates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from models.generation import Sampling, end_tokens, generate, log_probabilities

PER = ("choice", "token", "byte")


@dataclass(frozen=True)
class Question:
    """`prompt` in tokens. `choices`: what it can be answered by, ends included, of which number `right` is right;
    none: the generated text has to be `answer`."""

    prompt: list[int]
    asked: str  # its text
    answer: str
    answer_tokens: int
    choices: list[list[int]] = field(default_factory=list)
    texts: tuple[str, ...] = ()  # of the choices
    right: int = 0

    def sizes(self, per: str) -> list[int]:
        """What each choice's log-likelihood is divided by: `per` of PER."""
        if per == "token":
            return [len(choice) for choice in self.choices]
        return [max(1, len(text.encode())) if per == "byte" else 1 for text in self.texts]


def answered(
    model: Any,
    questions: Sequence[Question],
    tokenizer: Any,
    pad_token: int,
    end: str,
    batch_size: int,
    per: str = "choice",
) -> list[bool]:
    """Whether each was answered right, without any sampling. `end`: the text that ends an answer.

    `per`: a choice's log-likelihood counts whole, or divided by its tokens or UTF-8 bytes, so that length does not
    decide (the acc and acc_norm of lm-evaluation-harness are per choice and per byte).
    """
    told: list[bool] = [False] * len(questions)
    chosen = [number for number, question in enumerate(questions) if question.choices]
    pairs = [(questions[number].prompt, choice) for number in chosen for choice in questions[number].choices]
    scores = iter(log_probabilities(model, pairs, pad_token=pad_token, batch_size=batch_size))
    for number in chosen:
        sums = [sum(next(scores)) / size for size in questions[number].sizes(per)]
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
        end_tokens=end_tokens(tokenizer, getattr(model, "generation_config", None)),
        stop=[end],
        tokenizer=tokenizer,
        batch_size=batch_size,
    )
    for at, (answer, *_) in answers:
        text = tokenizer.decode(answer.ids, skip_special_tokens=True)
        told[free[at]] = text.split(end)[0].strip() == questions[free[at]].answer.strip()
    return told
