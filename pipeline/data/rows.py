"""Prepared rows by name: built once, shared by the stages of a run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.data import corpora, packing


def rows_of(data: corpora.Data, split: str, tokenizer: Any, root: Path) -> tuple[Any, dict[str, Any], Path]:
    """(rows, statistics, folder) of a split; the folder's name says everything the rows depend on."""
    folder = root / f"{split}-{_key(data, tokenizer)}"
    if folder.exists():
        return (*packing.prepared(folder), folder)
    return (*packing.prepare(corpora.documents(data, split), tokenizer, data, folder=folder), folder)


def _key(data: corpora.Data, tokenizer: Any) -> str:
    told = [corpora.content_key(data), sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        told.append(
            {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
        )  # last call's
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
