"""Conversations: what a message is."""

from __future__ import annotations

from typing import Any

from models.errors import Refusal
from pipeline.data.columns import weight_of

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names for the usual roles
_USUAL = ("system", "user", "assistant", "tool")

# Of a message, what is said beside its content; whatever else stands there is taken for a note about it.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_UNREAD = {
    **dict.fromkeys(_THOUGHTS, "put the thought into content as <think>…</think>"),
    "refusal": "put it into content",
    **dict.fromkeys(("function_call", "tool_call"), "write the call out in content"),
    "tools": "write the tools out in content",
    **dict.fromkeys(("audio", "image", "images", "video", "videos"), "leave the conversation out"),
}
# Of a row, what conversations are told in columns beside them.
_UNREAD_COLUMNS = {
    "tools": "write the tools out in a system message",
    "functions": "write the functions out in a system message",
    "system": "make it the first message",
}
BESIDE = tuple(_UNREAD_COLUMNS)

Conversation = list[dict[str, Any]]  # each message has role and content, and a weight where it is not 1
Content = str | Conversation  # of a document


def conversation(cell: Any, where: str, unanswered: bool = False) -> Conversation:
    """Messages of role and content, also from ShareGPT's from and value, and a weight where it is not 1: Axolotl's
    `train: false` is one of 0.

    A content in parts, as OpenAI writes it, is their text.
    """
    if not isinstance(cell, list):
        raise Refusal(f"{where}: holds {type(cell).__name__} where a list of messages is needed")
    messages: Conversation = []
    for number, message in enumerate(cell):
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role") or fields.get("from")
        content = fields.get("content") if fields.get("content") is not None else fields.get("value")
        content = _joined(content)
        _refuse_unread(fields, _UNREAD, f"{where}: message {number}", "field")
        if not isinstance(role, str) or not isinstance(content, str) or fields.get("tool_calls"):
            raise Refusal(
                f"{where}: message {number} is not a role and a text content; mend or drop the conversation "
                "(tool calls and images are not supported)"
            )
        messages.append({"role": _role(role), "content": content})
        weight = 0 if False in (fields.get("train"), fields.get("training")) else fields.get("weight")
        if weight is not None and weight_of(weight, f"{where}: message {number}") != 1:
            messages[-1]["weight"] = float(weight)
    if messages and not unanswered and all(message["role"] != "assistant" for message in messages):
        raise Refusal(f"{where}: no message is the assistant's, so there is nothing to learn; drop it")
    return messages


def _role(written: str) -> str:
    small = ROLES.get(written.lower(), written.lower())
    return small if small in _USUAL else written


def check_beside(cells: dict[str, Any], where: str) -> None:
    """Refuse what a row says beside its conversation, in columns of BESIDE."""
    _refuse_unread(cells, _UNREAD_COLUMNS, where, "column")


def _refuse_unread(fields: dict[str, Any], unread: dict[str, str], where: str, kind: str) -> None:
    for name, remedy in unread.items():
        value = fields.get(name)
        if value and (not isinstance(value, str) or value.strip() not in ("", "[]", "{}", "null")):
            raise Refusal(f"{where} has {name}, which is not read here; {remedy}, or drop the {kind}")


def _joined(content: Any) -> Any:
    """The text of parts that all are text; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") in ("text", None)]
    whole = len(texts) == len(content) and all(isinstance(text, str) for text in texts)
    return "".join(str(text) for text in texts) if whole else content
