"""Which added tokens a chat template frames messages with, although the tokenizer does not call them special.

DeepSeek's `<｜User｜>` and `<｜Assistant｜>` are such. A template is shown messages of one private-use character, and
what it writes around each is read outwards: tokens, space and single words (a role) belong to the frame, up to where
prose begins. So a token that a system text of the template's own only speaks of is none.

Mark-up, which is a token `<x>` whose `</x>` is a token too, stands inside of turns: thoughts (`<think>`), a tool's
results. It stays vocabulary, but where nothing else is between it and what the user or the system says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from itertools import product
from typing import TYPE_CHECKING

from models.errors import Refusal
from pipeline.data.bounded import bounded
from pipeline.data.controls import Controls
from pipeline.data.rendering import Template
from pipeline.data.source import DataSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = {"system": "\U0010c000", "user": "\U0010c001", "assistant": "\U0010c002", "tool": "\U0010c003"}
_ASKERS = (_SAID["system"], _SAID["user"])
_SHOWN = (
    *(("system",), ("user",), ("assistant",), ("tool",), ("system", "user"), ("user", "assistant")),
    *(("system", "user", "assistant"), ("user", "assistant", "user"), ("user", "assistant", "tool")),
    ("user", "assistant", "tool", "assistant"),
)
_OPENING = re.compile(r"<(\w+)>")


def controls_of(
    tokenizer: PreTrainedTokenizerBase, data: DataSource | None = None, template: Template | None = None
) -> Controls:
    """The control tokens of what is read with a tokenizer: the special ones, and what a chat template frames a message
    with.

    `template`: of conversations, which are rendered with it. Of texts, whoever reads them, it is the tokenizer's own;
    one that cannot be shown anything frames nothing there.
    """
    setting, vocabulary = data.control_tokens if data is not None else None, tokenizer.get_added_vocab()
    own, frames = template is None, set[str]()
    try:
        if own and tokenizer.chat_template is not None:
            template = Template(tokenizer, tokenizer.get_chat_template())
        if template is not None:
            with bounded("data" if data is None else data.node):
                frames = frames_of(template, vocabulary)
    except (Refusal, ValueError):  # ValueError: it has several templates, and none of them is the default
        if not own:
            raise
    return Controls(tokenizer, setting, frames)


def frames_of(template: Template, added: Collection[str]) -> set[str]:
    """Of the tokens `added`, those at the borders of messages, in any conversation that the template takes."""
    of_words = {token for token in added if len(token) > 2 and not token[0].isspace() and not token[0].isalnum()}
    openings = (_OPENING.fullmatch(token) for token in of_words)
    names = {opening[1] for opening in openings if opening and f"</{opening[1]}>" in of_words}
    markup = {f"{start}{name}>" for name in names for start in ("<", "</")}
    longest_first = sorted(of_words, key=lambda token: (-len(token), token))
    pattern = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    found: set[str] = set()
    for roles, prompt in product(_SHOWN, (False, True)):
        try:
            text = template.render([{"role": role, "content": _SAID[role]} for role in roles], prompt)
        except (RecursionError, MemoryError):
            raise
        except Exception:  # it takes no such conversation, for a reason of its own
            continue
        for asked, pieces in _around(text, pattern):
            found |= _border(pieces, of_words, markup, asked)
    return found


def _around(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[bool, list[str]]]:
    """What stands before and behind each content, nearest first; and whether the user or the system says it."""
    parts = re.split(f"([{''.join(_SAID.values())}])", text)
    for at in range(1, len(parts), 2):
        for part, direction in ((parts[at - 1], -1), (parts[at + 1], 1)):
            yield parts[at] in _ASKERS, pattern.split(part)[::direction]


def _border(pieces: list[str], tokens: Collection[str], markup: Collection[str], asked: bool) -> set[str]:
    found = set()
    only_markup = asked
    for piece in pieces:
        if piece not in tokens and len(piece.split()) > 1:
            break
        if piece in tokens and (only_markup or piece not in markup):
            found.add(piece)
        only_markup = only_markup and (piece in markup or not piece.strip())
    return found
