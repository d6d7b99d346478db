"""Examples of a task: what a record of a file becomes by the templates of the configuration."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from models.errors import Refusal


@dataclass(frozen=True)
class Example:
    """A query and its answer as text; `choices`: the texts it is chosen from, if it is."""

    query: str
    answer: str
    context: str
    choices: tuple[str, ...] = ()
    again: Callable[[Callable[[str], str]], Example] | None = field(default=None, compare=False, repr=False)

    def quoted(self, quote: Callable[[str], str]) -> Example:
        """The example with everything that a record holds quoted, and what the templates say as it is."""
        return self.again(quote) if self.again is not None else self

    @property
    def asked(self) -> str:
        """What the student reads: examples that are alike in it belong to one split, and never show each other."""
        return self.query.rstrip()


@dataclass(frozen=True)
class Templates:
    """task.query, task.answer and the like: how a record becomes an example."""

    query: str  # templates name columns in braces
    answer: str
    context: str
    label: str | None
    choices: Any  # list of texts, or the name of a column that lists them; None: answers are free text
    separator: str

    def check(self) -> None:
        """Refuse what no record could mend."""
        for name in ("query", "answer", "context"):
            if not isinstance(getattr(self, name), str):
                raise Refusal(
                    f"task.{name}={getattr(self, name)}: need a text that names columns in braces"
                    + ("; an empty one shows no context" if name == "context" else "")
                )
        shared = _columns(self.query) & _columns(self.answer) if not self.label else set()
        if shared:
            raise Refusal(
                f"task.query={self.query!r} names {{{min(shared)}}}, as task.answer does: the student would read what "
                f"it is to answer; leave it out of one of them"
            )
        if not self.separator:
            raise Refusal("task.separator is empty, so no answer would end; use a line end or another mark")
        if self.label and not self.choices:
            raise Refusal(f"task.label={self.label}: its numbers choose among task.choices, which is not set")
        if isinstance(self.choices, list) and len(set(self.choices)) < 2:
            raise Refusal(f"task.choices={self.choices}: a task with one answer has nothing to teach; give two or more")
        if "{" not in self.query:
            raise Refusal(
                f"task.query={self.query!r} names no column, so all queries are alike; name one, as {{question}}"
            )

    def example(self, where: str, record: dict[str, Any], quote: Callable[[str], str] = str) -> Example:
        """The example of a record, which stands at `where`. Raises Refusal where it does not fit the templates.

        `quote` is done to what the record holds, and not to what the templates say.
        """
        again = partial(self.example, where, record)
        plain, record = record, {name: _quoted(value, quote) for name, value in record.items()}
        choices = self._choices(where, record)
        # An answer that the configuration lists is the configuration's.
        answer = self._answer(where, plain if isinstance(self.choices, list) else record, choices)
        if choices and answer not in choices:
            raise Refusal(f"{where}: its answer {answer!r} is none of task.choices={', '.join(choices)}")
        if broken := [each for each in (answer, *choices) if self.separator in each]:
            raise Refusal(
                f"{where}: the answer {broken[0][:40]!r} holds task.separator={self.separator!r}, which would end it; "
                f"choose a separator that no answer holds"
            )
        if not answer.strip():
            raise Refusal(f"{where}: its answer is empty; drop it, or mend task.answer={self.answer!r}")
        query = _filled(where, record, "query", self.query)
        if not query.strip():
            raise Refusal(f"{where}: its query is empty; drop it, or mend task.query={self.query!r}")
        return Example(query, answer, _filled(where, record, "context", self.context), choices, again)

    def _choices(self, where: str, record: dict[str, Any]) -> tuple[str, ...]:
        if isinstance(self.choices, str):
            listed = record.get(self.choices)
            if not isinstance(listed, list) or len(listed) < 2:
                raise Refusal(f"{where}: task.choices={self.choices} is no column of two or more answers")
            return tuple(map(str, listed))
        return tuple(map(str, self.choices)) if self.choices else ()

    def _answer(self, where: str, record: dict[str, Any], choices: tuple[str, ...]) -> str:
        if self.label:
            number = str(record.get(self.label)).removesuffix(".0")  # whole numbers of a column of floats
            if not (number.isascii() and number.isdigit() and int(number) < len(choices)):
                raise Refusal(
                    f"{where}: task.label={self.label} is {record.get(self.label)!r}; need the number of one of "
                    f"task.choices, 0 to {len(choices) - 1} (a column of texts is task.answer='{{{self.label}}}')"
                )
            return choices[int(number)]
        return _filled(where, record, "answer", self.answer)


def _quoted(value: Any, quote: Callable[[str], str]) -> Any:
    if isinstance(value, list):
        return [_quoted(each, quote) for each in value]
    return quote(value) if isinstance(value, str) else value


def _filled(where: str, record: dict[str, Any], name: str, template: str) -> str:
    """The template of task.NAME with the record's columns put in."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise Refusal(f"task.{name}={template!r}: {error}; double a brace that names no column") from None
    if odd := [text for _, _, form, conversion in parts for text in (form, conversion) if text]:
        raise Refusal(f"task.{name}={template!r}: columns are put in as they are; leave {odd[0]!r} out")
    wanted = [column for _, column, _, _ in parts if column is not None]
    if missing := [column for column in wanted if record.get(column) is None]:
        there = f"it has {', '.join(record) or 'nothing'}"
        raise Refusal(
            f"{where}: task.{name}={template!r} names {{{missing[0]}}}, and "
            + ("that is null here; drop it" if missing[0] in record else f"{there}; set task.{name} to fit")
        )
    # Not str.format, which would also look inside of what it puts in.
    return "".join(text + ("" if column is None else str(record[column])) for text, column, _, _ in parts)


def _columns(template: str) -> set[str]:
    try:
        return {column for _, column, _, _ in string.Formatter().parse(template) if column}
    except ValueError:  # reported with the place where it is filled
        return set()
