"""Records of a task: the rows of a .jsonl, .json, .csv or .parquet file or of a hub dataset, or pairs of ciphers."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.data import ciphers
from pipeline.data.readers import objects, parquet_rows

_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def records(split: str, source: Any, subset: str | None, revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of task.SPLIT=`source`, each with where it stands; none where it is not given."""
    if source is None:
        return
    label, path = f"task.{split}={source}", Path(str(source)).expanduser()
    name, _, number = str(source).partition(":")
    if name == "ciphers":
        digit, _, noisy = number.partition(":")
        if not digit.isdigit() or not int(digit) < len(ciphers.ALPHABETS) or noisy not in ciphers.KINDS:
            raise Refusal(
                f"{label}: they go from ciphers:0 to ciphers:{len(ciphers.ALPHABETS) - 1}; :noisy or :unseen may follow"
            )
        yield from ((label, dict(pair)) for pair in ciphers.pairs(int(digit), noisy))
    elif path.suffix in _SUFFIXES:
        if not path.is_file():
            raise Refusal(f"{label}: no such file; give one that is there, or a hub id OWNER/NAME")
        yield from _of_file(path)
    elif "/" in str(source) and not path.exists():
        yield from _of_hub(label, name, subset, revision, number or split)
    else:
        raise Refusal(f"{label}: give a {', '.join(_SUFFIXES)} file, a hub id OWNER/NAME, or ciphers:NUMBER")


def _of_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        csv.field_size_limit(2**30)  # a cell can be a document
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    where = f"{path} line {reader.line_num}"
                    if None in row:
                        raise Refusal(f"{where}: it has more cells than the header; quote what holds a comma")
                    yield where, row
            except (UnicodeDecodeError, csv.Error) as error:
                raise Refusal(f"{path}: no CSV in UTF-8 ({error}); write it again") from error
    elif path.suffix == ".parquet":
        yield from parquet_rows(path)
    else:
        yield from objects(path)


def _of_hub(
    label: str, path: str, name: str | None, revision: str | None, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name=name, revision=revision, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise Refusal(
            f"{label}: no such file, and the hub dataset (task.name={name}, task.revision={revision}, split {split}) "
            f"does not load: {' '.join(str(error).split())}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{label} row {number}", dict(row)


def source_key(source: Any) -> str:
    """Changes with what a file holds; of a hub dataset its name."""
    path = Path(str(source)).expanduser()
    if str(source).startswith("ciphers:"):
        return json.dumps([source, ciphers.key()])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(source)
