"""The documents of a split in parts of some files, of some lines or row groups of a large file, or of some rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.data import parts
from pipeline.data.columns import Columns
from pipeline.data.locations import EMBEDDED, Location
from pipeline.data.parts import Batch, Parts, batched
from pipeline.data.readers import hub_dataset, is_array, parquet
from pipeline.data.reading import Document, embedded_documents, file_documents, hub_documents
from pipeline.data.splits import Split, Tally, chosen

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Extent:
    """Some of a location: `part` are row groups of a .parquet file, bytes of lines of JSON, or rows of a hub dataset;
    None is all of it."""

    location: Location
    size: int  # bytes
    path: Path | None = None
    part: range | None = None


class DocumentParts(Parts):
    """`chat` and the rest as Parts says. What is read of the source is its sizes, and where lines end in it."""

    spread = True

    def __init__(
        self,
        split: Split,
        given: Sequence[Location],
        columns: Columns,
        sample_by: str,
        name: str | None,
        revision: str | None,
    ) -> None:
        """`given`: where the split is read from; the others as of Documents."""
        self.split, self.columns, self.sample_by = split, columns, sample_by
        for location in given:
            columns.check_weighable(location)
        self._hubs = {
            location.label: hub_dataset(location, name, revision) for location in given if location.kind == "hub"
        }
        self.chat = self._is_chat(given)
        self._parts: list[list[Extent]] = [[]]
        if split.held_out and not split.holdout:
            given = []  # nothing is held out
        size = 0  # of the last part
        for extent in chain.from_iterable(map(self._extents, given)):
            if size + extent.size > parts.PART_BYTES and self._parts[-1]:
                self._parts.append([])
                size = 0
            self._parts[-1].append(extent)
            size += extent.size

    def __len__(self) -> int:
        return len(self._parts)

    def batches(self, number: int, found: Counter[str]) -> Iterator[Batch]:
        tally = Tally()
        read = chain.from_iterable(map(self._documents, self._parts[number]))
        yield from batched(chosen(self.split, read, tally), found)
        found["read"] += tally.read
        found["empty"] += tally.empty

    def check(self, found: Counter[str]) -> None:
        self.split.check_some(found["read"], found["documents"])

    def _is_chat(self, given: Sequence[Location]) -> bool:
        kinds = set()
        for location in given:
            if location.kind in EMBEDDED:
                kinds.add(False)
            elif location.kind == "hub":
                columns = self._hubs[location.label].column_names
                kinds.add(self.columns.chosen(columns, location.label)[1])
            else:
                kinds |= {self.columns.is_chat(path) for path in location.files}
            if len(kinds) > 1:
                raise Refusal(f"{location.label}: text and chat cannot be mixed; give sources of one kind")
        return kinds == {True}

    def _extents(self, location: Location) -> Iterator[Extent]:
        if location.kind == "hub":
            dataset = self._hubs[location.label]
            rows = max(1, int(parts.PART_BYTES / max(1, _bytes_each(dataset))))
            for first in range(0, len(dataset), rows):
                some = range(first, min(len(dataset), first + rows))
                yield Extent(location, parts.PART_BYTES, part=some)
        elif location.kind in EMBEDDED:
            yield Extent(location, 0)
        for path in location.files:
            size = path.stat().st_size
            if path.suffix == ".parquet":
                yield from (Extent(location, each, path, part) for each, part in _row_groups(path))
            elif path.suffix == ".txt" or is_array(path) or size <= parts.PART_BYTES:
                yield Extent(location, size, path)
            else:
                yield from (Extent(location, len(part), path, part) for part in _lines(path, size))

    def _documents(self, extent: Extent) -> Iterator[Document]:
        location = extent.location
        if location.kind == "hub":
            return hub_documents(self.columns, location, self._hubs[location.label], extent.part)
        if extent.path is None:
            return embedded_documents(location)
        return self._of_file(extent.path, extent.part)

    def _of_file(self, path: Path, part: range | None) -> Iterator[Document]:
        try:
            yield from file_documents(self.columns, self.sample_by, path, self.chat, part=part)
        except Refusal:
            if part is None or not part.start or path.suffix == ".parquet":
                raise
            # Lines are counted from the part's beginning. Whoever is to mend one needs its number in the file.
            for _ in file_documents(self.columns, self.sample_by, path, self.chat, part=range(part.stop)):
                pass
            raise


def _bytes_each(dataset: Dataset) -> float:
    return float(dataset.data.nbytes) / max(1, dataset.data.num_rows)


def _row_groups(path: Path) -> Iterator[tuple[int, range]]:
    """Row groups that lie side by side, as many as make a part; and their size in bytes, unpacked."""
    told: Any = parquet(path).metadata
    first, size = 0, 0
    for group in range(told.num_row_groups):
        more = told.row_group(group).total_byte_size
        if size and size + more > parts.PART_BYTES:
            yield size, range(first, group)
            first, size = group, 0
        size += more
    yield size, range(first, told.num_row_groups)


def _lines(path: Path, size: int) -> Iterator[range]:
    """Bytes of whole lines, a part's worth each."""
    begin = 0
    with path.open("rb") as file:
        while begin < size:
            file.seek(min(size, begin + parts.PART_BYTES) - 1)
            file.readline()
            yield range(begin, file.tell())
            begin = file.tell()
