"""Documents as they stand in a source, one after another: of files, of hub datasets, of the embedded corpora."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data.columns import Columns, weight_of
from pipeline.data.conversations import BESIDE, Content, check_beside, conversation
from pipeline.data.locations import Location
from pipeline.data.readers import column_names, json_cells, parquet_cells, text_documents
from pipeline.data.stdlib import library_documents

if TYPE_CHECKING:
    from datasets import Dataset

Document = tuple[str, Content, float]  # where it stands, for messages; what it holds; its weight


def hub_documents(
    columns: Columns, location: Location, dataset: Dataset, rows: range | None = None, unanswered: bool = False
) -> Iterator[Document]:
    """The documents of these rows of a hub dataset, or of all."""
    column, chat = columns.chosen(dataset.column_names, location.label)
    names = columns.with_weight(column, dataset.column_names, location.label)
    also = [name for name in BESIDE if name in dataset.column_names and name not in names] if chat else []
    dataset = dataset.select_columns(names + also)
    if rows is not None:
        dataset = dataset.select(rows)
    cells = chain.from_iterable(
        zip(*(batch[name] for name in names + also), strict=True) for batch in dataset.iter(1000)
    )
    first = rows.start if rows else 0
    return _documents(
        ((f"{location.label} row {i}", row) for i, row in enumerate(cells, first)), chat, unanswered, also
    )


def embedded_documents(location: Location) -> Iterator[Document]:
    if location.kind == "stdlib":
        texts: Iterable[str] = library_documents()
    else:
        from pipeline.data import ciphers

        texts = ciphers.documents("noisy" in location.name)
    return ((f"{location.name} document {number}", text, 1.0) for number, text in enumerate(texts))


def file_documents(
    columns: Columns, sample_by: str, path: Path, chat: bool, unanswered: bool = False, part: range | None = None
) -> Iterator[Document]:
    """The documents of one file. `part`: of these row groups of a .parquet file, or bytes of lines of JSON."""
    if path.suffix == ".txt":
        texts = enumerate(text_documents(path, sample_by))
        return ((f"{path} document {number}", text, 1.0) for number, text in texts)
    found = column_names(path)
    column, found_chat = columns.chosen(found, str(path))
    if found_chat != chat:
        raise Refusal(f"{path}: text and chat cannot be mixed, as with the files before it; give one kind")
    cells = parquet_cells if path.suffix == ".parquet" else json_cells
    also = [name for name in BESIDE if name != column] if chat else []
    read = cells(path, columns.with_weight(column, found, str(path)), also, part)
    return _documents(read, chat, unanswered, also)


def _documents(
    cells: Iterable[tuple[str, tuple[Any, ...]]], chat: bool, unanswered: bool = False, also: Sequence[str] = ()
) -> Iterator[Document]:
    """From the cells of the text's or messages' column, of the weight's where there is one, and of those beside."""
    for where, values in cells:
        cell, *weights = values[: len(values) - len(also)]
        check_beside(dict(zip(also, values[len(values) - len(also) :], strict=True)), where)
        weight = weight_of(weights[0], where) if weights else 1.0
        if cell is None:
            yield where, "", weight
        elif chat:
            yield where, conversation(cell, where, unanswered), weight
        elif isinstance(cell, str):
            yield where, cell, weight
        else:
            raise Refusal(f"{where}: holds {type(cell).__name__} {str(cell)[:40]!r} where text is needed")
