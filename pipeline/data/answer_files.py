"""Files of answers: what the stage `generate` wrote, or any pairs of prompt and completion, as tokens or as texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.data.readers import column_names, objects, parquet_rows
from pipeline.data.source import SPLITS

ANSWERS, DROPPED = "answers.parquet", "dropped.parquet"  # in a folder of the stage generate
TEACHERS = "teacher_prompt_ids"
_SUFFIXES = (".parquet", ".jsonl")
_IDS, _TEXTS = ("prompt_ids", "completion_ids"), ("prompt", "completion")


def files_of(split: str, given: str | None) -> list[Path]:
    """What data.SPLIT=`given` names; nothing where it is not given."""
    if given is None:
        return []
    path = Path(given).expanduser()
    if path.is_file() and path.suffix in _SUFFIXES:
        return [path]
    if (path / ANSWERS).is_file():
        return [path / ANSWERS]
    found = sorted(each for each in path.glob("*") if each.suffix in _SUFFIXES and each.name != DROPPED)
    if not path.exists():
        raise Refusal(f"data.{split}={given}: no such file or folder; run the stage generate, or name what it wrote")
    if not found:
        raise Refusal(f"data.{split}={given}: it holds no {ANSWERS}, and no {' or '.join(_SUFFIXES)} file")
    return found


def columns_of(path: Path, as_text: bool, context: bool) -> tuple[str, str]:
    """The columns of prompt and completion to read; a Refusal where they are missing. `context`: the teacher's prompt
    is needed too."""
    there = set(column_names(path))
    wanted = _TEXTS if as_text or not there.issuperset(_IDS) else _IDS
    if missing := [name for name in wanted if name not in there]:
        raise Refusal(
            f"{path}: no column {missing[0]}; need {' and '.join(_IDS)} (tokens), or {' and '.join(_TEXTS)} "
            f"(text), and it has {', '.join(sorted(there)) or 'nothing'}"
        )
    if context and (TEACHERS not in there or wanted == _TEXTS):
        raise Refusal(f"{path}: data.context=true needs the tokens of {TEACHERS}; set it to false")
    return wanted


def read_answers(path: Path, as_text: bool, context: bool) -> Iterator[dict[str, Any]]:
    """The rows of a file, with the columns that `columns_of` finds and those that say more of an answer."""
    wanted = columns_of(path, as_text, context)
    more = [
        "prompt",
        "completion",
        "split",
        "finish_reason",
        *([TEACHERS] if context else ["prompt_ids"] if as_text else []),
    ]
    for where, row in records(path, [*wanted, *more]):
        if any(name not in row for name in wanted):
            raise Refusal(f"{where}: it has no {' and '.join(wanted)}, unlike the first; mend or drop it")
        if odd := [name for name in _TEXTS if not isinstance(row.get(name) or "", str)]:
            raise Refusal(
                f"{where}: its {odd[0]} is {type(row[odd[0]]).__name__}, and text is needed; conversations are "
                f"read by data=chat"
            )
        if row.get("split") not in (None, *SPLITS):
            raise Refusal(f"{where}: its split is {row['split']!r}; need one of {', '.join(SPLITS)}")
        yield row


def records(path: Path, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a file, each with where it stands; of these columns those that it has."""
    if path.suffix == ".parquet":
        yield from parquet_rows(path, [name for name in column_names(path) if name in names])
        return
    for where, record in objects(path):
        yield where, {name: value for name, value in record.items() if name in names}


def prompt_keys(row: dict[str, Any]) -> set[bytes]:
    """What a row's prompt is known by: its tokens, its text, or both."""
    known = [row[name] for name in ("prompt_ids", "prompt") if row.get(name)]
    return {hashlib.blake2b(json.dumps(each).encode(), digest_size=16).digest() for each in known}
