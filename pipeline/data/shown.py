"""Prepared sequences as a person reads them: what `show_data` prints."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.prepared import sequences_of
from pipeline.data.rendering import with_template
from pipeline.data.source import DataSource
from pipeline.data.token_bytes import special_ids, token_bytes

LEGEND = "⟦…⟧ is learnt, ‹…› is a control token; each text of a packed sequence begins a line, and none sees another"


def shown(
    data: DataSource, tokenizer: Any, teacher_tokenizer: Any, rows: int, scratch: Path, documents: int
) -> list[str]:
    """The first `rows` of the sequences that the first `documents` of the training split make, in lines.

    They are as they enter training, but for the order, and for what else a sequence is packed with in all of the data.
    """
    with_template(tokenizer, data)
    sequences, statistics, _ = sequences_of(data.sample(documents), "train", tokenizer, scratch, teacher_tokenizer)
    lines = [f"{len(sequences):,} sequences of the first documents, {documents:,} at most: {LEGEND}"]
    for number in range(min(rows, len(sequences))):
        row = sequences[number]
        told = f"row {number}: {len(row['input_ids'])} tokens, {row['supervised']} learnt"
        lines.append(told + (f", which count {row['weight']:g}" if "weight" in row else ""))
        lines += _lines(tokenizer, row, "")
        if "teacher_input_ids" in row:
            lines.append("the teacher reads:")
            lines += _lines(teacher_tokenizer or tokenizer, row, "teacher_")
    if not len(sequences):
        lines.append(f"no text of data.train is left after tokenizing ({statistics})")
    return lines


def _lines(tokenizer: Any, row: dict[str, Any], side: str) -> list[str]:
    ids, positions = row[f"{side}input_ids"], row[f"{side}position_ids"]
    targets = row.get(f"{side}targets") or [IGNORED] * len(ids)  # of two tokenizers only the student's
    learnt = [False, *(target != IGNORED for target in targets[:-1])]
    begins = [at for at, position in enumerate(positions) if position == 0]
    return [_text(tokenizer, ids[a:b], learnt[a:b]) for a, b in pairwise([*begins, len(ids)])]


def _text(tokenizer: Any, ids: list[int], learnt: list[bool]) -> str:
    """A text with its marks; characters that a terminal would obey are written out."""
    try:
        words: list[bytes | None] = token_bytes(tokenizer)
    except Refusal:  # it does not say which bytes a token stands for
        words = [tokenizer.decode([id_]).encode() for id_ in range(len(tokenizer))]
    controls = special_ids(tokenizer)
    text, inside = b"", False
    for id_, learns in zip(ids, learnt, strict=True):
        if learns != inside:
            text += ("⟦" if learns else "⟧").encode()
        inside = learns
        word = words[id_]
        if id_ in controls or word is None:
            word = f"‹{tokenizer.convert_ids_to_tokens(id_)}›".encode()
        text += word
    whole = text.decode(errors="replace") + ("⟧" if inside else "")
    return "".join(one if one.isprintable() else "⏎" if one == "\n" else repr(one)[1:-1] for one in whole)
