"""What a chat template makes of messages, with nothing from outside in it: the same text on every day and machine.

Templates can ask for today's date (`strftime_now`), which would make text that is recorded on one day another text on
the next; they are told one fixed date. What draws at random in jinja is refused.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data.bounded import bounded, timed
from pipeline.data.source import DATE, DataSource
from pipeline.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_RANDOM = re.compile(r"\|\s*random\b|\blipsum\s*\(")
_ANY_MARK = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_MONTHS = [
    *("January", "February", "March", "April", "May", "June", "July"),
    *("August", "September", "October", "November", "December"),
]


class Template:
    """A chat template with its tokenizer's special tokens and a date."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, date: str | None = None) -> None:
        if _RANDOM.search(text):
            raise Refusal(
                "the chat template draws at random (jinja's random or lipsum), so no two runs would read the same "
                "text; give a data.chat_template without it"
            )
        # A macro of this name goes before the library's function of it; what follows it begins a line, as ever.
        self.text = clock(date or DATE) + text if "strftime_now" in text else text
        self.marks = bool(_MARKS.search(text))  # whether it says itself where the assistant speaks
        self._variables: dict[str, Any] = tokenizer.special_tokens_map

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """`prompt`: with the header of the assistant's next turn."""
        return str(self._rendered(messages, add_generation_prompt=prompt)[0][0])

    def marked(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and what stands between {% generation %} marks in it, in characters."""
        (text,), (spans,) = self._rendered(messages, return_assistant_tokens_mask=True)
        return text, spans

    def _rendered(self, messages: list[dict[str, Any]], **words: Any) -> Any:
        from transformers.utils.chat_template_utils import render_jinja_template

        with timed():
            return render_jinja_template(conversations=[messages], chat_template=self.text, **words, **self._variables)


def clock(date: str) -> str:
    """jinja: the macro strftime_now, which tells midnight of a day, in English whatever the locale."""
    day = datetime.fromisoformat(date).replace(tzinfo=UTC)
    name, month = _DAYS[day.weekday()], _MONTHS[day.month - 1]
    words = {letter: day.strftime(f"%{letter}") for letter in "CdeFDgGHIjklmMRSTuUVwWyY"}
    words |= {"a": name[:3], "A": name, "b": month[:3], "h": month[:3], "B": month, "p": "AM", "P": "am"}
    words |= {"c": f"{name[:3]} {month[:3]} {day.day:2} 00:00:00 {day.year}", "x": day.strftime("%m/%d/%y")}
    words |= {"X": "00:00:00", "r": "12:00:00 AM", "s": str(int(day.timestamp())), "f": "000000", "z": "", "Z": ""}
    words |= {f"-{letter}": words[letter].lstrip("0 ") or "0" for letter in "deHIjklmMSUVWy"}
    told = "".join(f"|replace('%{letters}','{word}')" for letters, word in words.items())
    return (
        "{%- macro strftime_now(format) -%}{{ format|replace('%%','\\x00')" + told + "|replace('\\x00','%') }}"
        "{%- endmacro %}\n"
    )


def tokenizer_of(path: str, data: DataSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id, with the template of `data` where it names one: every stage that reads
    the same text with the same tokenizer then finds the same packed sequences."""
    return with_template(load_tokenizer(path, trust_remote_code), data)


def with_template(tokenizer: Any, data: DataSource) -> Any:
    """`tokenizer`, changed in place to the template of `data` where it names one."""
    if data.chat_template is not None:
        tokenizer.chat_template = chat_template(tokenizer, data)
    return tokenizer


def chat_template(tokenizer: PreTrainedTokenizerBase, data: DataSource) -> str:
    """The template conversations are rendered with: data.chat_template's file, or the tokenizer's own."""
    if data.chat_template is not None:
        return template_file(data.chat_template, f"{data.node}.chat_template={data.chat_template}")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise Refusal(
            "the data are conversations and the tokenizer has no chat template; give data.chat_template=FILE (a simple "
            "one is examples/chat.jinja)"
        ) from error


def template_file(path: str, where: str) -> str:
    """The text of a file that is a template. `where`: the setting that names it, for the message."""
    from jinja2 import Environment, TemplateError, TemplateSyntaxError

    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"{where}: not UTF-8 text ({error}); convert it, for example with iconv") from error
    # As transformers compiles it, but that needs torch: the marks are its own, and stand around whole statements.
    plain = _ANY_MARK.sub(lambda it: it[1] + ("endif" if it[2] else "if true") + it[3], text)
    try:
        with bounded(where), timed():
            Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).compile(plain)
    except (TemplateError, SyntaxError, ValueError) as error:
        if isinstance(error, Refusal):
            raise
        line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
        raise Refusal(f"{where}: not a jinja template ({line}{error.args[0]}); mend it") from error
    return text


def template_of(tokenizer: PreTrainedTokenizerBase, data: DataSource) -> Template:
    return Template(tokenizer, chat_template(tokenizer, data), data.date)


def teachers_template(tokenizer: PreTrainedTokenizerBase, data: DataSource) -> Template:
    try:
        text = chat_template(tokenizer, data)
    except Refusal as error:
        raise Refusal(
            "the data are conversations and the teacher's tokenizer has no chat template; give "
            "data.chat_template=FILE, which then is used for the student and the teacher"
        ) from error
    return Template(tokenizer, text, data.date)
