"""The contract of a dialect: how a kind of server is recognised, scores given tokens and continues text.

A new dialect is one file in this folder with one class; models/teachers/server.py finds it by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

Row = Mapping[int, float | None]  # id → natural log-probability, of one next token


@dataclass(frozen=True)
class Generation:
    """A continuation. `ids` is None where the server gives only text; `finish_reason` is `stop` or `length`.

    `log_probabilities`: natural, at temperature 1, of each id; None where the server does not give all of them.
    """

    text: str
    ids: list[int] | None
    finish_reason: str | None
    log_probabilities: list[float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Continue:
    """How a prompt is continued. Sampling is from the model alone: what a server would add by itself (top-k, min-p,
    penalties) has to be switched off."""

    max_new_tokens: int
    temperature: float
    top_p: float
    stop: list[str]

    def body(self, prompt: list[int] | str, seed: int | None) -> dict[str, Any]:
        """What all servers call alike."""
        body: dict[str, Any] = {"prompt": prompt, "temperature": self.temperature, "top_p": self.top_p}
        if seed is not None:
            body["seed"] = seed
        if self.stop:
            body["stop"] = self.stop
        return body


class Dialect(Protocol):
    """One kind of server. Made with the `Connection` of one call, whose threads share it."""

    name: ClassVar[str]  # as teacher.endpoint.dialect takes it
    owner: ClassVar[str | None]  # what such a server writes as `owned_by` into its list of models
    names_model: ClassVar[bool]  # whether its requests name a model; False: the server has one
    cannot_score: ClassVar[str | None]  # why this kind of server cannot score given tokens; None: it can

    def recognises(self) -> bool:
        """Whether a page that only this kind has is there; asked where no `owner` was recognised."""
        ...

    def answers(self, ids: list[int]) -> bool:
        """Whether a server of unknown kind scores tokens in this dialect: tried on `ids`, two tokens. False where
        trying would tell nothing."""
        ...

    def rows(self, ids: list[int]) -> list[Row]:
        """For a piece of T ≥ 2 ids, T-1 rows: the best `connection.top_k` next tokens after each prefix but the whole.

        A row may hold one entry more, the piece's own next token. An answer of another shape may raise AttributeError,
        KeyError, TypeError or ValueError, which the caller turns into a Refusal.
        """
        ...

    def continuation(self, prompt: list[int] | str, settings: Continue, seed: int | None) -> Generation: ...


def choice_of(answer: Any) -> dict[str, Any]:
    """The first choice of a completion in OpenAI's shape; empty where there is none."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def values_of(
    ids: list[int] | None, entries: Any, read: Callable[[Any], tuple[int | None, float]]
) -> list[float] | None:
    """The log-probabilities of an answer's tokens; None where some are missing, or are of other tokens.

    `read` gives an entry's token (None: the server names none) and its log-probability.
    """
    if ids is None or not isinstance(entries, list) or len(entries) != len(ids):
        return None
    try:
        pairs = [read(one) for one in entries]
        values = [float(value) for _, value in pairs]
    except (KeyError, TypeError, ValueError):
        return None
    same = all(name in (None, token) for (name, _), token in zip(pairs, ids, strict=True))
    return values if same and all(map(math.isfinite, values)) else None
