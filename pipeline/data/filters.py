"""Which of a teacher's answers are learnt from: the contract of conf/filter/*.yaml, and the filters there are.

One of your own is a dataclass with `keep` and a yaml that names it; or, without a yaml, a function (see Predicate).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from models.errors import Refusal


@dataclass(frozen=True)
class Candidate:
    """One answer, as a filter sees it."""

    prompt: str
    completion: str
    ids: list[int]  # of the completion, with the token that ended it
    log_probabilities: list[float] | None  # natural, of each id that was generated; None where a server reports none
    finish_reason: str  # "stop" or "length"


@runtime_checkable
class Filter(Protocol):
    def keep(self, answers: list[Candidate]) -> list[bool]:
        """Which of all answers to one prompt stay."""
        ...


@dataclass(frozen=True)
class Length:
    """Answers of so many tokens, the one that ended it included; `finished`: and that came to an end."""

    minimum: int = 1
    maximum: int | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        if self.maximum is not None and self.maximum < self.minimum:
            raise Refusal(f"filter length: maximum={self.maximum} is below minimum={self.minimum}; nothing would stay")

    def keep(self, answers: list[Candidate]) -> list[bool]:
        most = math.inf if self.maximum is None else self.maximum
        return [
            self.minimum <= len(answer.ids) <= most and not (self.finished and answer.finish_reason == "length")
            for answer in answers
        ]


@dataclass(frozen=True)
class Repetition:
    """Answers in which at most this share of the runs of `ngram` tokens has stood before."""

    ngram: int = 4
    maximum_share: float = 0.3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise Refusal(f"filter repetition: ngram={self.ngram}: need at least 1 token")
        if not 0 <= self.maximum_share <= 1:
            raise Refusal(f"filter repetition: maximum_share={self.maximum_share}: need [0, 1]; 1 keeps everything")

    def keep(self, answers: list[Candidate]) -> list[bool]:
        return [repeated_share(answer.ids, self.ngram) <= self.maximum_share for answer in answers]


def repeated_share(ids: list[int], ngram: int) -> float:
    """1 − distinct ÷ all runs of `ngram` tokens; 0 of a text that is shorter."""
    runs = [tuple(ids[at : at + ngram]) for at in range(len(ids) - ngram + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


@dataclass(frozen=True)
class LogProbability:
    """Answers that the teacher finds likely: at least so much per token, natural logarithm, on average."""

    minimum: float = -2.0

    def __post_init__(self) -> None:
        if self.minimum > 0:
            raise Refusal(f"filter log_probability: minimum={self.minimum:g}: no token has more than 0; -2 is usual")

    def keep(self, answers: list[Candidate]) -> list[bool]:
        if any(answer.log_probabilities is None for answer in answers):
            raise Refusal("filter log_probability: the server reports no log-probabilities; leave the filter out")
        found = [answer.log_probabilities or [0.0] for answer in answers]
        return [sum(each) / len(each) >= self.minimum for each in found]


@dataclass(frozen=True)
class MajorityVote:
    """Of the answers to a prompt, those that come to what most of them come to (self-consistency, arXiv:2203.11171).

    `pattern`: a regular expression; what an answer comes to is the last match of it, of its first group if it has one.
    Answers without a match stay out. Of equally many, the first one wins.
    """

    pattern: str = r"-?\d+(?:\.\d+)?"
    minimum_share: float = 0.0  # of all answers to the prompt

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as problem:
            raise Refusal(f"filter majority_vote: pattern={self.pattern}: {problem}; mend the expression") from None
        if not 0 <= self.minimum_share <= 1:
            raise Refusal(f"filter majority_vote: minimum_share={self.minimum_share}: need [0, 1]; 0.5 asks for half")

    def keep(self, answers: list[Candidate]) -> list[bool]:
        results = [self._result(answer.completion) for answer in answers]
        votes = Counter(result for result in results if result is not None)
        if not votes:
            return [False] * len(answers)
        ((winner, count),) = votes.most_common(1)
        won = count >= self.minimum_share * len(answers)
        return [won and result == winner for result in results]

    def _result(self, completion: str) -> str | None:
        matches = list(re.finditer(self.pattern, completion))
        if not matches:
            return None
        found = matches[-1][1] if matches[-1].re.groups else matches[-1][0]
        return found or None  # the group may be in another branch than the match


@dataclass(frozen=True)
class Predicate:
    """A function of yours, `module.function`, of a Candidate: whether it stays. Its module is imported, and so runs."""

    function: str

    def __post_init__(self) -> None:
        self._resolved()

    def keep(self, answers: list[Candidate]) -> list[bool]:
        keep = self._resolved()
        kept = []
        for answer in answers:
            try:
                kept.append(bool(keep(answer)))
            except Exception as problem:  # a user's code can raise whatever it likes
                raise Refusal(
                    f"filter predicate: {self.function} raised {type(problem).__name__}: {problem} on the answer to "
                    f"{answer.prompt[:40]!r}; mend it and run the same command again, the answers are kept"
                ) from problem
        return kept

    def _resolved(self) -> Callable[[Candidate], Any]:
        module, _, name = self.function.rpartition(".")
        if not module:
            raise Refusal(f"filter predicate: function={self.function}: need module.function")
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ImportError as problem:
            raise Refusal(
                f"filter predicate: function={self.function}: {problem}; put its folder on PYTHONPATH"
            ) from None
        if not callable(found):
            raise Refusal(f"filter predicate: function={self.function}: {module} has no function {name}")
        return found


def code_key(filters: Iterable[Filter]) -> str:
    """A hash of the files that users' filters and predicates are written in; "" where there are none of them."""
    names = {
        each.function.rpartition(".")[0] if isinstance(each, Predicate) else type(each).__module__ for each in filters
    }
    files = [getattr(importlib.import_module(name), "__file__", None) for name in sorted(names - {__name__})]
    hashes = [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest() if hashes else ""
