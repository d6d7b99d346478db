"""Reading .txt, .jsonl, .json and .parquet files and hub datasets: what they hold, each part with where it stands."""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from models.errors import Refusal
from pipeline.data.locations import Location

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow.parquet import ParquetFile

SEPARATOR = "<|endoftext|>"

# How a .txt file becomes documents: one ends at the first blank line after so many characters, or at the
# first line end after so many more. A speech or a paragraph alone is too little context to learn from, and a
# whole file cannot be split three ways, so the default lies between them.
SAMPLE_BY = {
    "section": (4096, 8192),
    "line": (0, 0),
    "paragraph": (0, math.inf),
    "document": (math.inf, math.inf),
}


def text_documents(path: Path, sample_by: str) -> Iterator[str]:
    """The documents of a .txt file, without blank lines around them.

    `<|endoftext|>` always separates documents, and a file that has it is not divided into sections.
    """
    blank_line, line_end = SAMPLE_BY[sample_by]
    if sample_by == "section" and _holds(path, SEPARATOR.encode()):
        blank_line = line_end = math.inf
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for line in file:
                *closed, line = line.split(SEPARATOR)
                for part in closed:
                    yield from _joined([*lines, part])
                    lines, size = [], 0
                if lines or not line.isspace():
                    lines.append(line)
                    size += len(line)
                if size > line_end or (size > blank_line and line.isspace()):
                    yield from _joined(lines)
                    lines, size = [], 0
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}: not UTF-8 text ({error}); convert it, for example with iconv") from error
    yield from _joined(lines)


def _joined(lines: list[str]) -> list[str]:
    text = "".join(lines).rstrip()
    return [text] if text else []


def _holds(path: Path, word: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(word) >= 0


def parquet(path: Path) -> ParquetFile:
    from pyarrow.parquet import ParquetFile

    with _refusing(path):
        file = ParquetFile(path, memory_map=True, page_checksum_verification=True)  # where it holds checksums
        _ = file.schema_arrow  # read only now
        return file


def parquet_rows(
    path: Path, columns: list[str] | None = None, groups: range | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file, each with where it stands; of these columns, or all, and of these row groups, or all."""
    with _refusing(path):
        file = parquet(path)
        number = sum(file.metadata.row_group(group).num_rows for group in range(groups.start if groups else 0))
        for batch in file.iter_batches(1000, columns=columns, row_groups=None if groups is None else list(groups)):
            for row in batch.to_pylist():
                yield f"{path} row {number}", row
                number += 1


def parquet_cells(
    path: Path, columns: list[str], also: Sequence[str] = (), part: range | None = None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What each row holds in `columns`, and in those of `also` that the file has; in others it holds None. `part`: of
    these row groups."""
    read = [*columns, *(name for name in column_names(path) if name in also and name not in columns)]
    rows = parquet_rows(path, read, part)
    return ((where, tuple(row.get(name) for name in (*columns, *also))) for where, row in rows)


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Parquet tells of damage by whichever of its layers finds it."""
    from pyarrow import ArrowException

    try:
        yield
    except Refusal:
        raise
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # also a day that Python's calendar lacks
        if isinstance(error, OSError) and error.errno is not None:
            raise  # by the file system
        why = str(error).strip().partition("\n")[0]
        raise Refusal(f"{path}: not a readable parquet file ({why}); write it again") from error


def json_cells(
    path: Path, columns: list[str], also: Sequence[str] = (), part: range | None = None
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """What each object holds in `columns`, and in those of `also` that it has; in others it holds None. `part`: of
    these bytes of a file with an object a line."""
    for where, record in objects(path, part):
        for column in columns:
            if column not in record:
                raise Refusal(f"{where}: no column {column}, unlike the first object; it has {', '.join(record)}")
        yield where, tuple(record.get(column) for column in (*columns, *also))


def objects(path: Path, part: range | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .json file, each with where it stands. `part`: of these bytes, whole lines."""
    behind = f" from byte {part.start:,} on" if part is not None and part.start else ""
    with _opened(path, part) as file:
        where = str(path)
        try:
            array = part is None and is_array(path)
            for number, item in enumerate(json.load(file) if array else file, start=1):
                where = f"{path} {'item' if array else 'line'} {number}{behind}"
                if not array and item.isspace():
                    continue
                record = item if array else json.loads(item)
                if not isinstance(record, dict):
                    raise Refusal(f"{where}: holds {type(record).__name__} where an object is needed")
                yield where, record
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}: not UTF-8 text ({error}); convert it, for example with iconv") from error
        except RecursionError as error:
            raise Refusal(f"{where}: its JSON is nested too deeply; mend or drop it") from error
        except Refusal:
            raise
        except ValueError as error:  # of syntax, or a number of thousands of digits
            raise Refusal(f"{where}: not JSON ({error}); write one object a line, or one array") from error


@contextmanager
def _opened(path: Path, part: range | None) -> Iterator[TextIO]:
    if part is None:
        with path.open(encoding="utf-8-sig") as file:
            yield file
        return
    with path.open("rb") as whole:
        whole.seek(part.start)
        yield TextIOWrapper(BytesIO(whole.read(len(part))), encoding="utf-8" if part.start else "utf-8-sig")


def is_array(path: Path) -> bool:
    """Whether a .json file is one array, which cannot be read in parts."""
    if path.suffix != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def column_names(path: Path) -> list[str]:
    """The columns of a .parquet file; of .jsonl and .json files the keys of the first object."""
    if path.suffix == ".parquet":
        return list(parquet(path).schema_arrow.names)
    return list(next(objects(path), ("", {}))[1])


def count_documents(files: list[Path]) -> int | None:
    """Documents in these files, where that is cheap to know."""
    if all(file.suffix == ".parquet" for file in files):
        return sum(int(parquet(file).metadata.num_rows) for file in files)
    if all(file.suffix == ".jsonl" for file in files) and sum(file.stat().st_size for file in files) < 2**28:
        return sum(1 for file in files for line in file.read_bytes().splitlines() if line.strip())
    return None


def hub_dataset(location: Location, name: str | None, revision: str | None) -> Dataset:
    """`name` is a subset, `revision` a commit, tag or branch."""
    from datasets import load_dataset

    try:
        return load_dataset(location.name, name=name, revision=revision, split=location.hub_split)
    except Exception as error:  # the hub's client raises a dozen kinds, all of which the user can mend
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{location.label}: no such file or folder here, and the hub dataset (data.name={name}, "
            f"data.revision={revision}, split {location.hub_split}) does not load: {reason}"
        ) from error
