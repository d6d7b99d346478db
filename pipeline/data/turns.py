"""Where in a rendered conversation the assistant speaks: each turn's content, and the token that ends the turn.

A template writes a conversation as a whole: it may leave out what was thought in earlier turns, put an empty thought
before the last answer, or the system's message beside the user's last. So contents are found by marks of our own: the
conversation is rendered once more with private-use characters around what the assistant says. Where that changes
nothing else, the marks stand at the very places. Where it does, the texts before and after a turn tell, if the whole
begins with them.

A turn begins where the template's header for the assistant ends, if between that and the content is nothing but
space; a thought that the template adds by itself is not learnt. It ends with the control token that follows the
content, or, in templates without one, where the template is done with the turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import product, takewhile
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data.bounded import bounded
from pipeline.data.controls import Controls, Tokens
from pipeline.data.frames import controls_of
from pipeline.data.rendering import Template, template_of
from pipeline.data.source import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]  # role and content
Range = tuple[int, int]

_ANSWER, _THOUGHT, _END, _MOST = 0x10C000, 0x10D000, 0x10E000, 0x1000  # private-use characters, one a message
_MARKS = re.compile(f"[{chr(_ANSWER)}-{chr(_END + _MOST - 1)}]")
_OPENED = re.compile(r"\s*<think>\s*(?!</think>|\s)")
_CLOSED = re.compile(r".*</think>\s*", re.DOTALL)
_ONE = [{"role": "user", "content": "x"}]


def turns_of(tokenizer: PreTrainedTokenizerBase, data: DataSource, template: Template | None = None) -> Turns:
    template = template or template_of(tokenizer, data)
    return Turns(template, controls_of(tokenizer, data, template))


@dataclass(frozen=True)
class Turns:
    """Finds the assistant's turns in what one template writes with one tokenizer's control tokens.

    Texts are given and taken with quotations (pipeline/data/controls.py).
    """

    template: Template
    controls: Controls

    def prompt(self, messages: Messages, where: str) -> str:
        """A conversation, and the header of the assistant's turn that is to come."""
        with _refusing(where):
            messages = self._quoted(messages, where)
            text = self.template.render(messages, prompt=True)
            self._check_written(messages, text, where, prompt=True)
        return text

    def rendered(self, messages: Messages, where: str) -> tuple[str, list[Range]]:
        """A conversation, and where in it the assistant speaks, in characters. Raises Refusal where that is not
        known."""
        with _refusing(where):
            messages = self._quoted(messages, where)
            numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            if self.template.marks:
                text, marked = self.template.marked(messages)
                self._check_written(messages, text, where)
                numbered = numbers if len(numbers) == len(marked) else [None] * len(marked)
                return text, [self._within(messages, text, *each) for each in zip(marked, numbered, strict=True)]
            text = self.template.render(messages)
            places, known = self._places(messages, text, numbers), _Header()
            found = [self._turn(messages, text, number, places, known) for number in numbers]
        spans: list[Range] = []
        for number, span in zip(numbers, found, strict=True):
            begin, end = span or (0, 0)
            before = spans[-1][1] if spans else 0
            if begin < before and text[begin:before].isspace():  # the space that both were given is the one's before
                begin = before
            if span is None or begin < before:
                raise Refusal(
                    f"{where}: what the chat template makes of message {number} is not found in the conversation, so "
                    "the assistant's part is not known; give a data.chat_template with {% generation %} marks"
                )
            spans.append((begin, end))
        with _refusing(where):
            self._check_written(messages, text, where)
        return text, spans

    def tokens(self, texts: Sequence[str], places: Sequence[str]) -> Iterator[Tokens]:
        """Of what `prompt` and `rendered` wrote. `places`: where each stands, for the message."""
        for text, where, tokens in zip(texts, places, self.controls.tokens(texts), strict=True):
            if not self.controls.parses and (odd := self.controls.differing(text, tokens[0])):
                raise Refusal(
                    f"{where}: the tokenizer makes other control tokens of it than the chat template writes, first "
                    f"{odd!r}, so turns could be forged or stay open; drop it, or take a tokenizer.json whose control "
                    "tokens are not normalized"
                )
            yield tokens

    def _check_written(self, messages: Messages, text: str, where: str, prompt: bool = False) -> None:
        """Refuse a conversation of which the template leaves a message out, as it may where it does not know a role."""
        marked = [dict(message) for message in messages]
        expected = []
        for number, message in enumerate(messages[:_MOST]):
            answer, end = (_points(message["content"])[kind] for kind in (_ANSWER, _END))
            if message["content"][answer:end].strip():  # a thought may be left out
                expected.append(number)
                marked[number]["content"] = message["content"][:end] + chr(_END + number) + message["content"][end:]
        found = self._rendered(marked, prompt) or ""
        for number in expected:
            if chr(_END + number) not in found:
                others = [dict(message) for message in messages]
                others[number]["content"] = chr(_END + number)
                if self._rendered(others, prompt) == text:  # whatever the message says
                    role = self.controls.unquoted(messages[number]["role"])[:40]
                    raise Refusal(
                        f"{where}: the chat template leaves message {number} out, whose role is {role}; give it a role "
                        "that the template writes, or drop it, or give another data.chat_template=FILE"
                    )

    def _quoted(self, messages: Messages, where: str) -> Messages:
        quoted = [{name: self.controls.quote(message[name]) for name in ("role", "content")} for message in messages]
        for message in quoted:
            if found := _MARKS.search(message["content"]):
                raise Refusal(
                    f"{where}: it holds the private-use character U+{ord(found[0]):X}, of those by which turns are "
                    "found here; drop it"
                )
            self.controls.note(message["content"], where)
        return quoted

    # By marks of our own

    def _places(self, messages: Messages, text: str, numbers: list[int]) -> dict[str, int]:
        """Where in `text` each mark stands, of those that change nothing else in it; none where all do."""
        silent = {number for number in numbers if not messages[number]["content"].strip()}
        skipped: list[set[int]] = [set(), silent] if silent else [set()]  # some templates look for an empty content
        for without, kinds in product(skipped, ((_ANSWER, _THOUGHT, _END), (_ANSWER, _END))):
            marked = [dict(message) for message in messages]
            for number in numbers if len(messages) <= _MOST else ():
                content = messages[number]["content"]
                if number in without:
                    continue
                for kind, at in sorted(_points(content).items(), key=lambda point: (-point[1], -point[0])):
                    if kind in kinds:
                        content = content[:at] + chr(kind + number) + content[at:]
                marked[number]["content"] = content
            try:
                found = self.template.render(marked)
            except Exception:  # it looks into the contents
                continue
            marks = list(_MARKS.finditer(found))
            places = {mark[0]: mark.start() - before for before, mark in enumerate(marks)}
            if _MARKS.sub("", found) == text and len(places) == len(marks):
                return places
        return {}

    def _turn(self, messages: Messages, text: str, number: int, places: dict[str, int], known: _Header) -> Range | None:
        content = messages[number]["content"]
        kinds = [kind for kind in (_THOUGHT, _ANSWER) if chr(kind + number) in places]
        end = places.get(chr(_END + number))
        if not kinds or end is None:
            return self._compared(messages, text, number, self._header(messages, text, number))
        begin = places[chr(kinds[0] + number)]
        before = _without_space(content[: _points(content)[kinds[0]]])
        header = known.before(text, begin, before)
        if header is None:
            header = self._header(messages, text, number)
            known.learn(text, header)
        if header is not None and header <= begin and _without_space(text[header:begin]) in ("", before):
            begin = header
        else:
            opened = re.search(r"<think>\s*$", text[:begin]) if kinds[0] == _THOUGHT else None
            begin = opened.start() if opened else begin
        stop = self._end(messages, text, number, end)
        begin = len(text[:begin].rstrip(" "))  # with the spaces of a header: the token of a first word may begin there
        return None if stop is None else (begin, stop)

    def _header(self, messages: Messages, text: str, number: int) -> int | None:
        """Where the header of a turn ends, if the conversation begins as it does up to there."""
        before = self._rendered(messages[:number], prompt=True)
        return len(before) if before is not None and text.startswith(before) else None

    def _end(self, messages: Messages, text: str, number: int, at: int) -> int | None:
        """Behind the control token that follows a content, or behind all that is written of the turn."""
        follows = self._follows.match(text, at)
        if follows and follows[1] not in self._starts:
            return follows.end()
        through = self._rendered(messages[: number + 1])
        if through is not None and text.startswith(through):
            return len(through)
        return len(text) if number == len(messages) - 1 else None

    def _compared(self, messages: Messages, text: str, number: int, header: int | None) -> Range | None:
        """By the texts before and after, of a turn whose content is not found: of an empty one."""
        if header is None:
            return None
        follows = self._follows.match(text, header)
        if follows and follows[1] not in self._starts:
            return header, follows.end()
        through = self._rendered(messages[: number + 1])
        if through is None or not text.startswith(through):
            return None
        end = self._cut(text, header, len(through))
        *_, last = [None, *self.controls.pattern.finditer(text, header, end)]
        if last and last.end() == end and not messages[number]["content"].strip():
            header = last.start()  # nothing was said; what stands before is the template's own
        return header, end

    # By the template's marks

    def _within(self, messages: Messages, text: str, span: Range, number: int | None) -> Range:
        """What is between marks, without the header of the turn and what follows its end."""
        begin, end = span
        if number is not None and self.controls.pattern.match(text, begin):
            header = self._header(messages, text, number)
            begin = header if header is not None and begin < header <= end else begin
        return len(text[:begin].rstrip(" ")), self._cut(text, begin, end)

    def _cut(self, text: str, begin: int, end: int) -> int:
        """`end`, or behind the last control token before it, if only space is in between."""
        last = max((found.end() for found in self.controls.pattern.finditer(text, begin, end)), default=end)
        return end if text[last:end].strip() else last

    # What is known of the template

    @cached_property
    def _follows(self) -> re.Pattern[str]:
        return re.compile(rf"\s*({self.controls.pattern.pattern})")

    @cached_property
    def _starts(self) -> set[str]:
        """Control tokens that begin a turn."""
        tokenizer = self.controls.tokenizer
        found = {str(tokenizer.bos_token)}
        framed, asked = self._rendered(_ONE) or "", self._rendered(_ONE, prompt=True) or ""
        for part in (framed.removeprefix(str(tokenizer.bos_token)), asked[len(framed) :]):
            first = self.controls.pattern.search(part)
            found |= {first[0]} if first else set()
        return found - {str(tokenizer.eos_token)}

    def _rendered(self, messages: Messages, prompt: bool = False) -> str | None:
        try:
            return self.template.render(messages, prompt)
        except (RecursionError, MemoryError):
            raise
        except Exception:  # as it may of a part of a conversation
            return None


class _Header:
    """How the header of the assistant's turns ends in one conversation, so that not each turn is rendered for it.

    It is what the headers that were rendered end with alike: at first with more than the header, soon with no more.
    """

    def __init__(self) -> None:
        self.end: str | None = None

    def learn(self, text: str, header: int | None) -> None:
        if header is not None:
            found = text[max(0, header - 200) : header]
            pairs = zip(reversed(found), reversed(found if self.end is None else self.end), strict=False)
            alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            self.end = found[len(found) - alike :]

    def before(self, text: str, begin: int, thought: str) -> int | None:
        """Where the header ends before `begin`, with only space in between, or what begins a thought."""
        end = self.end or ""
        words = end.rstrip()
        near = len(text[:begin].rstrip())
        places = [near]
        if thought and text.endswith(thought, 0, near):
            places.insert(0, len(text[: near - len(thought)].rstrip()))
        for at in places if words else []:
            stop = at - len(words) + len(end)
            if text.endswith(end, 0, stop) and at <= stop <= begin:
                return stop
        return None


def _points(content: str) -> dict[int, int]:
    """Where marks go in a content: before what is thought, before the answer, and behind it."""
    closed, opened = _CLOSED.match(content), _OPENED.match(content)
    answer = closed.end() if closed else len(content) - len(content.lstrip())
    end = max(answer, len(content.rstrip()))
    found = {_ANSWER: answer, _END: end}
    return found | {_THOUGHT: opened.end()} if closed and opened else found


def _without_space(text: str) -> str:
    return "".join(text.split())


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    from jinja2 import TemplateError

    try:
        with bounded(where):
            yield
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        if isinstance(error, Refusal):
            raise
        raise Refusal(f"{where}: the chat template does not take it: {error}; mend or drop it") from error
