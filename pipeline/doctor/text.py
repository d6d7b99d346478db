"""Checks of what both models read: targets, tokens and templates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pipeline.data.source import DataSource
from pipeline.data.token_bytes import token_bytes
from pipeline.data.tokenizer import first_difference
from pipeline.doctor.findings import Finding, finding, skipped

_DATA = "the source of data.* that made these rows puts targets in other places; set targets[t] to input_ids[t + 1]"


def targets_are_the_next_tokens(rows: Iterable[dict[str, Any]]) -> Finding:
    """Each target is the token behind it, of the same document."""
    checked, wrong, first = 0, 0, ""
    for number, row in enumerate(rows):
        ids, positions = row["input_ids"], row["position_ids"]
        for at, target in enumerate(row["targets"]):
            if target < 0:
                continue
            checked += 1
            follows = at + 1 < len(ids) and positions[at + 1] == positions[at] + 1
            if not follows or ids[at + 1] != target:
                wrong += 1
                first = first or f"; the first in row {number}, token {at}"
    return finding(
        "shift", checked > 0 and not wrong, f"{wrong} of {checked:,} targets are not the next token{first}", _DATA
    )


def tokens_are_the_same(student: Any, teacher: Any, spans: bool) -> Finding:
    """`spans`: the teacher has its own tokens, and is compared where both cover the same bytes."""
    if teacher is None:
        return skipped("tokenizer", "no teacher is asked")
    difference = first_difference(teacher, student)
    if spans:
        return Finding("tokenizer", "ok", difference or "the same tokens, and align=true is not needed")
    told = difference or f"the same {len(student):,} tokens and merges"
    return finding("tokenizer", difference is None, told, "use the teacher's tokenizer for the student, or align=true")


def both_read_the_same_text(rows: Iterable[dict[str, Any]], student: Any, teacher: Any) -> Finding:
    """Of a teacher with tokens of its own: both sides of a row are the same bytes."""
    mine, theirs = token_bytes(student), token_bytes(teacher)
    checked, wrong = 0, 0

    def written(ids: list[int], words: list[bytes | None]) -> bytes:
        return b"".join(words[id_] or b"" for id_ in ids)

    for row in rows:
        checked += 1
        if any(max(row[name]) >= len(words) for name, words in (("input_ids", mine), ("teacher_input_ids", theirs))):
            wrong += 1
        else:
            wrong += written(row["input_ids"], mine) != written(row["teacher_input_ids"], theirs)
    measured = f"{wrong} of {checked} rows are other text for the teacher"
    return finding(
        "same text", not wrong, measured, "give the teacher its own tokens of the text: check data.* and align"
    )


_CONVERSATION = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": "Blue."}]


def templates_are_the_same(
    data: DataSource, chat: bool, student: Any, teacher: Any, render: Callable[[Any, DataSource], Any]
) -> Finding:
    """A conversation is written alike for both, and so begins every text. `render`: of a tokenizer the text."""
    if teacher is None:
        return skipped("template", "no teacher is asked")
    begins = [each("x", add_special_tokens=True)["input_ids"][:1] for each in (student, teacher)]
    words = [" ".join(t.convert_ids_to_tokens(ids)) for t, ids in zip((student, teacher), begins, strict=True)]
    remedy = "use one tokenizer's settings for both: copy tokenizer_config.json and the chat template of the teacher"
    if words[0] != words[1] and first_difference(teacher, student) is None:
        return finding(
            "template", False, f"a text begins with {words[0]} for the student, {words[1]} for the teacher", remedy
        )
    if not chat:
        return Finding("template", "ok", f"texts begin alike ({words[0]}); no conversations")
    one, other = (render(each, data) for each in (student, teacher))
    at = next(
        (i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other))
    )
    same = one == other
    told = (
        "one conversation, written alike"
        if same
        else f"{one[at : at + 30]!r} for the student, {other[at : at + 30]!r} for the teacher"
    )
    return finding("template", same, told, f"{remedy}, or give data.chat_template=FILE")


def rendered(tokenizer: Any, data: DataSource) -> str:
    """A conversation by the tokenizer's template, or the one that the data name."""
    from pipeline.data.rendering import chat_template

    return str(
        tokenizer.apply_chat_template(_CONVERSATION, chat_template=chat_template(tokenizer, data), tokenize=False)
    )
