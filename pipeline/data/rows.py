"""Prepared rows by name: built once, shared by the stages of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.data import corpora, packing


def rows_of(
    data: corpora.Data, split: str, tokenizer: Any, root: Path, teacher_tokenizer: Any | None = None
) -> tuple[Any, dict[str, Any], Path]:
    """(rows, statistics, folder) of a split; the folder's name says everything the rows depend on.

    With `teacher_tokenizer` they carry the teacher's tokens and the spans between both (pipeline/data/packing.py).
    """
    told = [corpora.content_key(data), *_told(tokenizer)]
    if teacher_tokenizer is not None:
        told += _told(teacher_tokenizer)
        # The ends are no part of the rules, and which tokens are special decides what is aligned.
        told += [[t.bos_token_id, t.eos_token_id, t.all_special_ids] for t in (tokenizer, teacher_tokenizer)]
    folder = root / f"{split}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
    if folder.exists():
        return (*packing.prepared(folder), folder)
    documents = corpora.documents(data, split)
    return (*packing.prepare(documents, tokenizer, data, folder=folder, teacher_tokenizer=teacher_tokenizer), folder)


def _told(tokenizer: Any) -> list[Any]:
    told = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        told.append(
            {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
        )  # last call's
    return told
