"""Documents held in memory as Arrow, about the size of their text."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING

from pipeline.data.conversations import Content

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType


def in_memory(
    values: Iterator[tuple[Content, float]], chat: bool, weighted: bool, fingerprint: Callable[[], str]
) -> Dataset:
    """One document a value; `fingerprint` is asked once all values are read."""
    import pyarrow as pa
    from datasets import Dataset

    name = "messages" if chat else "text"
    tables = []
    while chunk := list(islice(values, 1000)):  # so that Python strings of only one chunk exist at a time
        contents, weights = zip(*chunk, strict=True)
        differ = chat and any("weight" in message for messages in contents for message in messages)
        table = pa.table({name: pa.array(contents, type=_message_lists(differ) if chat else pa.string())})
        tables.append(table.append_column("weight", pa.array(weights, pa.float64())) if weighted else table)
    empty = pa.schema(
        {name: _message_lists(False) if chat else pa.string()} | ({"weight": pa.float64()} if weighted else {})
    )
    return Dataset(
        pa.concat_tables([empty.empty_table(), *tables], promote_options="permissive"),
        fingerprint=fingerprint(),
    )


def _message_lists(weighted: bool) -> DataType:
    import pyarrow as pa

    weight = {"weight": pa.float64()} if weighted else {}
    return pa.list_(pa.struct({"role": pa.string(), "content": pa.string()} | weight))


def of_one_kind(parts: list[Dataset]) -> list[Dataset]:
    """The parts, all with message weights if one has them: datasets itself does not join different messages."""
    from datasets import Dataset

    schemas = {part.data.schema.remove_metadata() for part in parts}
    weighing = [schema for schema in schemas if schema.names[0] == "messages" and "weight" in str(schema.field(0).type)]
    if len(schemas) == 1 or not weighing or any(schema.names != weighing[0].names for schema in schemas):
        return parts
    return [Dataset(part.data.table.cast(weighing[0])) for part in parts]


def with_empty(dataset: Dataset, count: int) -> Dataset:
    """The dataset, with the number of empty documents that were left out of it."""
    dataset.info.description = f"empty documents left out: {count}"
    return dataset


def empty_documents(dataset: Dataset) -> int:
    """How many empty documents were left out of this dataset."""
    counted = re.search(r"empty documents left out: (\d+)", dataset.info.description or "")
    return int(counted[1]) if counted else 0
