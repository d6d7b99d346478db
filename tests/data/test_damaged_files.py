"""Files of text with some bytes changed: each is refused in one line, or read as another reader reads it."""

from __future__ import annotations

import csv
import io
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import Refusal
from pipeline.data.answer_files import read_answers
from pipeline.data.documents import Documents, documents
from pipeline.data.records import records

ROWS = [{"text": f"Document {i}: é😀\n{'x' * i}", "n": i} for i in range(12)]
CHAT = [{"messages": [{"role": "user", "content": f"q{i} é"}, {"role": "assistant", "content": "a"}]} for i in range(9)]
ANSWERS = [{"prompt": f"q{i}", "completion": f"é {i}"} for i in range(9)]
LINES = [
    b'{"text": "\\ud800"}\n',
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    b'{"n": ' + b"1" * 5000 + b', "text": "a"}\n',
    b'{"text": NaN}\n',
    b'{"text": null}\n',
    b'{"text": ["a"]}\n',
    b'{"text": "a\\u0000b"}\n',
    b"{}\n",
    b"\x00\n",
    b"\xff\xfe",
    b'{"messages": [{"role": "user"}]}\n',
    b'{"messages": [{"role": 3, "content": {"a": 1}}, {"role": "assistant", "content": "\\udfff"}]}\n',
]


def written(rows: list[dict[str, Any]], suffix: str) -> bytes:
    if suffix == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    if suffix == ".csv":
        return ("prompt,completion\n" + "".join(f'{row["prompt"]},"{row["completion"]}"\n' for row in rows)).encode()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return (lines if suffix == ".jsonl" else json.dumps(rows)).encode()


def read(what: str, path: Path) -> list[Any]:
    if what in ("text", "messages"):
        found: list[Any] = list(documents(Documents(train=str(path), holdout=0), "train")[what])
        return found
    return (
        [row for _, row in records("train", path, None, None)]
        if what == "task"
        else list(read_answers(path, True, False))
    )


FILES = {
    (what, suffix): written(rows, suffix)
    for what, rows, suffixes in (
        ("text", ROWS, (".jsonl", ".json", ".parquet")),
        ("messages", CHAT, (".jsonl", ".json", ".parquet")),
        ("task", ANSWERS, (".jsonl", ".json", ".parquet", ".csv")),
        ("answers", ANSWERS, (".jsonl", ".parquet")),
    )
    for suffix in suffixes
}
_PLACE = st.integers(0, 10**6)
EDITS = st.lists(
    st.tuples(st.just("flip"), _PLACE, st.integers(0, 7))
    | st.tuples(st.just("cut"), _PLACE, st.none())
    | st.tuples(st.just("insert"), _PLACE, st.binary(min_size=1, max_size=9))
    | st.tuples(st.just("line"), _PLACE, st.sampled_from(LINES)),
    min_size=1,
    max_size=3,
)


def changed(content: bytes, edits: list[Any]) -> bytes:
    held = bytearray(content)
    for how, place, by in edits:
        at = place % (len(held) or 1)
        if how == "flip" and held:
            held[at] ^= 1 << by
        elif how == "cut":
            del held[at:]
        elif how == "insert":
            held[at:at] = by
        elif how == "line":
            at = held.find(b"\n", at) + 1
            held[at:at] = by
    return bytes(held)


@settings(max_examples=400)
@given(name=st.sampled_from(sorted(FILES)), edits=EDITS)
def test_changed_bytes_are_refused_in_one_line_or_read_as_they_stand(name: tuple[str, str], edits: list[Any]) -> None:
    what, suffix = name
    content = changed(FILES[name], edits)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(content)
        found, refusal = None, ""
        try:
            found = read(what, path)
        except Refusal as problem:
            refusal = str(problem)
    if found is None:
        assert str(path) in refusal
        assert "\n" not in refusal
    else:
        assert found == list(expected(what, suffix, content))


def expected(what: str, suffix: str, content: bytes) -> Iterator[Any]:
    """By Arrow's and Python's own readers."""
    if suffix == ".parquet":
        columns = {"text": ["text"], "messages": ["messages"], "answers": ["prompt", "completion"]}.get(what)
        rows = pq.ParquetFile(io.BytesIO(content)).read(columns=columns).to_pylist()
    else:
        text = io.StringIO(content.decode("utf-8-sig"), newline=None if suffix != ".csv" else "")
        array = suffix == ".json" and text.read().lstrip().startswith("[")
        text.seek(0)
        if suffix == ".csv":
            header, *cells = [row for row in csv.reader(text) if row] or [[]]
            rows = [dict(itertools.zip_longest(header, row)) for row in cells]
        else:
            rows = json.load(text) if array else [json.loads(line) for line in text if line.strip()]
    for row in rows:
        if what == "text" and row.get("text") and row["text"].strip():
            yield row["text"]
        elif what == "messages" and row.get("messages"):
            yield row["messages"]
        elif what in ("task", "answers"):
            yield row


def test_checksums_of_parquet_pages_are_looked_at(tmp_path: Path) -> None:
    """Without them a letter that is another one is a letter; Arrow writes them where it is asked to."""
    for checked in (False, True):
        path = tmp_path / f"{checked}.parquet"
        words = {"compression": "none", "use_dictionary": False, "write_page_checksum": checked}
        pq.write_table(pa.Table.from_pylist(ROWS), path, **words)
        path.write_bytes(path.read_bytes().replace(b"Document 3", b"Document 9"))
    assert read("text", tmp_path / "False.parquet")[3].startswith("Document 9")
    with pytest.raises(Refusal, match=r"True\.parquet: not a readable parquet file .*checksum.*; write it again"):
        read("text", tmp_path / "True.parquet")


def test_a_day_beyond_pythons_calendar_is_refused(tmp_path: Path) -> None:
    days = pa.array([10**9], pa.date32())
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"], "day": days}), tmp_path / "a.parquet")
    with pytest.raises(Refusal, match=r"a\.parquet: not a readable parquet file"):
        read("task", tmp_path / "a.parquet")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_the_same_files_unchanged_are_read_whole(suffix: str, tmp_path: Path) -> None:
    for what in ("text", "messages"):
        path = tmp_path / f"{what}{suffix}"
        path.write_bytes(FILES[what, suffix])
        assert len(read(what, path)) == len(ROWS if what == "text" else CHAT)
