"""Conversations: what a message is, and the text that a chat template makes of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data.columns import weight_of
from pipeline.data.rendering import rendering
from pipeline.data.source import DataSource
from pipeline.data.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names for the usual roles

Conversation = list[dict[str, Any]]  # each message has role and content, and a weight where it is not 1
Content = str | Conversation  # of a document


def conversation(cell: Any, where: str, unanswered: bool = False) -> Conversation:
    """Messages of role and content, also from ShareGPT's from and value, and a weight where it is not 1."""
    if not isinstance(cell, list):
        raise Refusal(f"{where}: holds {type(cell).__name__} where a list of messages is needed")
    messages: Conversation = []
    for number, message in enumerate(cell):
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role") or fields.get("from")
        content = fields.get("content") if fields.get("content") is not None else fields.get("value")
        if not isinstance(role, str) or not isinstance(content, str) or fields.get("tool_calls"):
            raise Refusal(
                f"{where}: message {number} is not a role and a text content; mend or drop the conversation "
                "(tool calls and images are not supported)"
            )
        messages.append({"role": ROLES.get(role, role), "content": content})
        weight = fields.get("weight")
        if weight is not None and weight_of(weight, f"{where}: message {number}") != 1:
            messages[-1]["weight"] = float(weight)
    if messages and not unanswered and all(message["role"] != "assistant" for message in messages):
        raise Refusal(f"{where}: no message is the assistant's, so there is nothing to learn; drop it")
    return messages


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
        return Path(data.chat_template).expanduser().read_text(encoding="utf-8")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise Refusal(
            "the data are conversations and the tokenizer has no chat template; give data.chat_template=FILE (a simple "
            "one is examples/chat.jinja)"
        ) from error


def teachers_template(tokenizer: PreTrainedTokenizerBase, data: DataSource) -> str:
    try:
        return chat_template(tokenizer, data)
    except Refusal as error:
        raise Refusal(
            "the data are conversations and the teacher's tokenizer has no chat template; give "
            "data.chat_template=FILE, which then is used for the student and the teacher"
        ) from error


def rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it the assistant speaks, end of turn included, in characters."""
    from jinja2 import TemplateError

    try:
        with rendering(where):
            if re.search(r"\{%-?\s*generation\s*-?%\}", template):
                return _marked(tokenizer, template, messages)
            return _compared(tokenizer, template, messages, where)
    except (TemplateError, TypeError) as error:
        raise Refusal(f"{where}: the chat template does not take it: {error}; mend or drop it") from error


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation
) -> tuple[str, list[tuple[int, int]]]:
    """By the template's own {% generation %} marks.

    Not by apply_chat_template's token mask: where a mark begins or ends with a character of no token (a
    space, to tokenizers that trim offsets), it supervises none or all of what follows.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    (text,), (spans,) = rendered
    return text, spans


def _compared(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """By the texts before and after each of the assistant's turns; both must begin the whole text."""

    def render(conversations: list[Conversation], prompt: bool) -> Any:
        return tokenizer.apply_chat_template(
            conversations, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text, *after = render([messages, *(messages[: i + 1] for i in turns)], prompt=False)
    before = render([messages[:i] for i in turns], prompt=True)
    for turn, prompt, through in zip(turns, before, after, strict=True):
        if not (text.startswith(through) and through.startswith(prompt)):
            raise Refusal(
                f"{where}: the chat template writes message {turn} differently once others follow, so the "
                "assistant's part is not known; give a data.chat_template with {% generation %} marks"
            )
    return text, [(len(prompt), len(through)) for prompt, through in zip(before, after, strict=True)]
