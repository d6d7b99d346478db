"""Flat token files: what is read is what was written, whatever the shards, the processes, and where one was killed."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data import document_parts, flat, parts, prepared
from pipeline.data.controls import Controls
from pipeline.data.document_parts import DocumentParts, Extent
from pipeline.data.documents import Documents, documents
from pipeline.data.flat import Columns, Shard, ShardWriter, bytes_a_token, end_to_end
from pipeline.data.packing import best_fit_decreasing, index, prepare
from pipeline.data.parts import Batch, Parts
from pipeline.data.prepared import sequences_of
from pipeline.data.sequences import Sequences
from pipeline.data.shards import Shards, shard_folder
from pipeline.data.shares import prepare_share
from pipeline.data.tokenizer import train_tokenizer
from pipeline.data.windows import windows
from tests.command import ROOT

TEXTS = [
    *sorted({text.strip() for text in topics.values()}, key=len)[:30],
    "naïve café 👩\u200d🚀 </s> é " * 9,
    "",
    "  ",
    "end </s>",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = train_tokenizer(TEXTS, 400, tmp_path_factory.mktemp("tokenizer"))
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    return made


def hashes(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What is read is what was written

KINDS = {
    "texts": Columns(300),
    "four bytes": Columns(70_000, learnt=True),
    "weights": Columns(300, learnt=True, weights=True),
    "another tokenizer's": Columns(300, learnt=True, teacher_vocabulary=70_000, spans=True),
    "a teacher's own prompts": Columns(300, learnt=True, teacher_vocabulary=300, prompted=True),
}


def some_pieces(columns: Columns, number: int, seed: int, longest: int) -> dict[str, list[Any]]:
    """As lists, as whoever made pieces one by one would write them."""
    draw = np.random.default_rng(seed)
    names = ["input_ids", "targets", "bytes"]
    names += ["weights"] if columns.weights else []
    names += ["teacher_input_ids"] if columns.teacher_vocabulary else []
    names += ["spans"] if columns.spans else []
    names += ["teacher_targets", "teacher_position_ids"] if columns.prompted else []
    lists: dict[str, list[Any]] = {name: [] for name in names}
    for _ in range(number):
        length = int(draw.integers(1, longest + 1))
        ids = draw.integers(0, columns.vocabulary, length)
        learnt = draw.random(length) < 0.6 if columns.learnt else np.ones(length, dtype=bool)
        learnt[-1] = False
        lists["input_ids"].append(ids)
        lists["targets"].append(np.where(learnt, np.append(ids[1:], 0), IGNORED))
        lists["bytes"].append(int(draw.integers(0, 99)))
        if columns.weights:
            lists["weights"].append(np.where(learnt, draw.choice([0.1, 0.7, 3], length), 0).astype(np.float32))
        if columns.teacher_vocabulary:
            theirs = draw.integers(0, columns.teacher_vocabulary, int(draw.integers(1, 9)))
            lists["teacher_input_ids"].append(theirs)
        if columns.spans:
            lists["spans"].append(draw.integers(0, 5, 4 * int(draw.integers(0, 4))))
        if columns.prompted:
            told = draw.random(len(theirs)) < 0.5
            told[-1] = False
            lists["teacher_targets"].append(np.where(told, np.append(theirs[1:], 0), IGNORED))
            cut = int(draw.integers(0, len(theirs)))
            lists["teacher_position_ids"].append([*range(cut), *range(len(theirs) - cut)])
    return lists


def by_hand(lengths: list[int], capacity: int) -> list[int]:
    """The row of every piece after best-fit decreasing, piece after piece; of rows with as much room, the last used."""
    stacks: dict[int, list[int]] = {}
    row_of, rows = [0] * len(lengths), count()
    for piece in sorted(range(len(lengths)), key=lambda piece: -lengths[piece]):
        room = min((room for room, rows in stacks.items() if rows and room >= lengths[piece]), default=capacity)
        row = row_of[piece] = stacks[room].pop() if stacks.get(room) else next(rows)
        stacks.setdefault(room - lengths[piece], []).append(row)
    order = {row: number for number, row in enumerate(dict.fromkeys(row_of))}
    return [order[row] for row in row_of]


def rows_by_hand(lists: dict[str, list[Any]], sequence_of: list[int]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [{} for _ in range(max(sequence_of) + 1)]
    for piece, row in enumerate(rows[number] for number in sequence_of):
        at, teachers_at = len(row.get("input_ids", [])), len(row.get("teacher_input_ids", []))
        found = {
            name: [float(v) if name == "weights" else int(v) for v in np.ravel(lists[name][piece])] for name in lists
        }
        found["position_ids"] = list(range(len(found["input_ids"])))
        if "teacher_input_ids" in found and "teacher_position_ids" not in found:
            found["teacher_position_ids"] = list(range(len(found["teacher_input_ids"])))
        if "spans" in found:
            found["spans"] = [v + (at, 0, teachers_at, 0)[place % 4] for place, v in enumerate(found["spans"])]
        for name, values in found.items():
            row[name] = row.get(name, []) + values
    for row in rows:
        row["bytes"] = sum(row["bytes"])
        row["supervised"] = sum(target != IGNORED for target in row["targets"])
        if "weights" in row:
            row["weight"] = pytest.approx(sum(row["weights"]), rel=1e-12)
    return rows


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sequences_hold_the_pieces_that_were_written(tmp_path: Path, kind: str, packed: bool) -> None:
    columns, shards, whole = KINDS[kind], [], {}
    for number, size in enumerate((7, 0, 23, 1)):
        lists = some_pieces(columns, size, number, 12)
        whole = {name: whole.get(name, []) + values for name, values in lists.items()}
        writer = ShardWriter(shard_folder(tmp_path, number), columns)
        for first in range(0, size, 3):
            writer.add(end_to_end({name: values[first : first + 3] for name, values in lists.items()}))
        writer.close({})
        shards.append(Shard.read(shard_folder(tmp_path, number)))
    index(tmp_path, shards, max_length=20, packing=packed, counted={})
    sequences = Sequences(tmp_path)
    lengths = list(map(len, whole["input_ids"]))
    rows = rows_by_hand(whole, by_hand(lengths, 20) if packed else list(range(len(lengths))))
    assert sequences.to_list() == rows
    assert sequences.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert sequences.counts.tolist() == [row.get("weight", row["supervised"]) for row in rows]
    assert pickle.loads(pickle.dumps(sequences.select([3, 1]))).to_list() == [rows[3], rows[1]]
    read, each = sequences.flat(1, 4)
    assert each.tolist() == [len(row["input_ids"]) for row in rows[1:4]]
    assert read["targets"].tolist() == [target for row in rows[1:4] for target in row["targets"]]
    assert all(isinstance(value, np.ndarray | np.generic) for value in sequences.arrays(0).values())
    if columns.prompted:
        assert sequences.teacher_side()[2] == {
            name: rows[2][f"teacher_{name}"] for name in ("input_ids", "position_ids", "targets")
        }


@pytest.mark.parametrize(("vocabulary", "most"), [(2**16, 3.0), (2**16 + 1, 5.0)])
@pytest.mark.parametrize("packed", [True, False])
def test_a_token_takes_two_or_four_bytes_and_the_index_less_than_one(
    tmp_path: Path, vocabulary: int, most: float, packed: bool
) -> None:
    (tmp_path / "rows").mkdir()
    writer = ShardWriter(shard_folder(tmp_path / "rows", 0), Columns(vocabulary))
    lists = some_pieces(Columns(vocabulary), 4000, 0, 60)  # short documents: 30 tokens each
    writer.add(end_to_end(lists))
    writer.close({})
    index(tmp_path / "rows", [Shard.read(tmp_path / "rows" / "00000")], max_length=512, packing=packed, counted={})
    kept = sum(path.stat().st_size for path in (tmp_path / "rows").rglob("*.bin") if path.name[0] != ".")
    made = sum(path.stat().st_size for path in (tmp_path / "rows").rglob("*.bin"))
    tokens = sum(map(len, lists["input_ids"]))
    assert kept <= most * tokens
    assert made <= 2 * most * tokens


def test_a_token_beyond_the_vocabulary_is_no_other_token(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "00000", Columns(300))
    with pytest.raises(ValueError, match="token 65536 is beyond the vocabulary"):
        writer.add(end_to_end({"input_ids": [[1, 2**16]], "targets": [[2**16, IGNORED]], "bytes": [1]}))
    writer.drop()


def test_sequences_of_an_earlier_version_are_not_read(tmp_path: Path) -> None:
    Dataset.from_dict({"input_ids": [[1]]}).save_to_disk(str(tmp_path / "rows"))
    with pytest.raises(Refusal, match="no packed sequences of this version; run the stage again"):
        Sequences(tmp_path / "rows")


@pytest.mark.parametrize("length", [8, 40, 1000])
def test_texts_together_are_the_windows_that_they_are_one_by_one(
    tokenizer: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the tokenizer's own lists of ids and places, which another function reads."""
    texts = [text for text in TEXTS if text.strip()]
    data = Documents(max_length=length, weight_column="w")
    given = (texts, list(range(1, len(texts) + 1)), list(map(str, texts)))
    found = []
    for plain in (True, False):
        controls = Controls(tokenizer)
        assert controls.plain
        if not plain:
            monkeypatch.setattr(Controls, "plain", False)
        made = windows(*given, controls, (1, 2), data)
        found.append([made.input_ids, made.lengths, made.bytes, made.weights, controls.count, controls.first])
    for together, alone in zip(*found, strict=True):
        assert np.array_equal(together, alone)
    assert found[0][4] == 10


# Parts


def written(folder: Path) -> list[Path]:
    """Texts in every kind of file, with what makes lines hard to find."""
    folder.mkdir()
    lines = [
        json.dumps({"text": f"{text}\r{number}", "w": number}, ensure_ascii=False) for number, text in enumerate(TEXTS)
    ]
    files = [folder / name for name in ("a.jsonl", "b.json", "c.json", "d.parquet", "e.txt")]
    files[0].write_bytes(b"\xef\xbb\xbf" + "\n \r\n".join(lines).encode())
    files[1].write_text("\r\n".join(lines) + "\n", newline="")
    files[2].write_text("[" + ",".join(lines) + "]")
    Dataset.from_dict({"text": [f"{text} in rows" for text in TEXTS]}).to_parquet(files[3], batch_size=4)
    files[4].write_text("\n\n".join(TEXTS))
    return files


@pytest.mark.parametrize("part_bytes", [1, 700, 5000, 2**26])
def test_the_parts_hold_every_document_once_and_in_order(
    tmp_path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", part_bytes)
    files = written(tmp_path / "text")
    data = Documents(train=list(map(str, files)), holdout=0.2, sample_by="line")
    for split in ("train", "validation", "test"):
        made = parts_of(data, split)
        found: Counter[str] = Counter()
        batches = [batch for number in range(len(made)) for batch in made.batches(number, found)]
        whole = documents(data, split)
        assert [text for batch in batches for text in batch.contents] == whole["text"][:]
        assert found["documents"] == len(whole)
        assert len(made) == 1 if part_bytes == 2**26 else len(made) > 5


def test_parts_of_many_files_look_at_the_size_of_each_a_few_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = 0

    class Counted(Extent):
        def __getattribute__(self, name: str) -> Any:
            nonlocal looked
            looked += name == "size"
            return super().__getattribute__(name)

    monkeypatch.setattr(document_parts, "Extent", Counted)
    monkeypatch.setattr(parts, "PART_BYTES", 100)
    for number in range(150):
        (tmp_path / f"{number:03d}.txt").write_text("ab")
    made = parts_of(Documents(train=str(tmp_path), holdout=0, sample_by="document"))
    assert [len(part) for part in made._parts] == [50, 50, 50]
    assert looked <= 3 * 150


def parts_of(data: Documents, split: str = "train") -> DocumentParts:
    given = data.locations(split) or data.locations("train")
    return DocumentParts(data.split(split), given, data.columns, data.sample_by, None, None)


def test_what_is_wrong_in_a_later_part_is_told_by_its_line_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 40)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(50)) + "{oh\n")
    made = parts_of(Documents(train=str(tmp_path / "a.jsonl"), holdout=0))
    with pytest.raises(Refusal, match=r"a\.jsonl line 51: not JSON"):
        list(made.batches(len(made) - 1, Counter()))


# Whole or absent


def source(folder: Path, **fields: Any) -> Documents:
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3))
    return Documents(train=str(path), max_length=50, holdout=0, workers=1, **fields)


def test_a_preparation_that_fails_anywhere_goes_on_to_the_same_bytes(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 6000)
    data = source(tmp_path)
    _, statistics = data.prepare("train", tokenizer, tmp_path / "at once")
    told = hashes(tmp_path / "at once")
    shards = len({name.partition("/")[0] for name in told if name[0] == "0"})
    assert shards > 3
    rename, calls = os.rename, count()
    made: list[str] = []

    def fails(*names: Any) -> None:
        made.append(names[1])
        if len(made) == 1 + next(calls) // 2:  # each time one more goes well, then one does not
            raise OSError(28, "no space")
        rename(*names)

    for module in (flat, prepared):
        monkeypatch.setattr(module.os, "rename", fails)
    failures = 0
    while not (tmp_path / "in turns").exists():
        made.clear()
        try:
            data.prepare("train", tokenizer, tmp_path / "in turns")
        except OSError:
            failures += 1
            (tmp_path / ".in turns.partial" / ".00001.other.partial").mkdir()
            (tmp_path / ".in turns.partial" / "rest").write_text("half")
    assert failures > 1
    assert hashes(tmp_path / "in turns") == told
    assert data.prepare("train", tokenizer, tmp_path / "in turns")[1] == statistics
    assert not (tmp_path / ".in turns.partial").exists()


def test_a_shard_that_is_whole_is_not_made_again(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 6000)
    data = source(tmp_path)
    aside = prepared.aside_of(tmp_path / "rows")
    shards = Shards(parts_of(data), tokenizer, data)
    shards.make_some(aside, [1, 3], 1)
    made = []
    make_one = Shards.make_one
    monkeypatch.setattr(Shards, "make_one", lambda *given: (made.append(given[2]), make_one(*given)))
    data.prepare("train", tokenizer, tmp_path / "rows")
    assert made == [number for number in range(len(shards.parts)) if number not in (1, 3)]


def test_several_processes_write_the_bytes_of_one(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 6000)
    files = written(tmp_path / "text")
    data = Documents(train=list(map(str, files)), max_length=50, holdout=0, workers=1)
    one = data.prepare("train", tokenizer, tmp_path / "one")
    data.workers = 2
    two = data.prepare("train", tokenizer, tmp_path / "two")
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert two[1] == one[1]
    assert one[1][prepared.FIRST_SPELLING].startswith(f"'</s>' in {files[0]} line ")
    assert one[1][prepared.SPELLINGS] == 10 * len(files)


def test_a_run_does_not_take_the_shards_away_that_jobs_are_writing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs at once are let be; each of the two kinds refuses to begin beside the other, in a line."""
    monkeypatch.setattr(parts, "PART_BYTES", 6000)
    data = source(tmp_path)
    told: list[str] = []
    make_one = Shards.make_one

    def beside(shards: Shards, folder: Path, number: int) -> None:
        monkeypatch.setattr(Shards, "make_one", make_one)
        half = ShardWriter(shard_folder(folder, number), shards.columns)  # that job's
        for other in others:
            try:
                other()
            except Refusal as problem:
                told.append(str(problem))
        assert half.aside.exists()
        half.drop()
        make_one(shards, folder, number)

    def run() -> None:
        sequences_of(data, "train", tokenizer, tmp_path / "data")

    def job() -> None:
        prepare_share(data, tokenizer, None, tmp_path / "data", (1, 2))

    others = [job, run]
    monkeypatch.setattr(Shards, "make_one", beside)
    job()
    assert len(told) == 1
    assert told[0].endswith("making shards of it; run the same command again when they have ended")
    others = [job]
    monkeypatch.setattr(Shards, "make_one", beside)
    run()
    assert told[1].endswith("leave prepare_data out, that run makes all of it")
    job()
    names = [path.name for path in (tmp_path / "data").iterdir() if path.suffix == ".partial"]
    assert [name for name in names if name.startswith(".train")] == []


def test_what_is_reckoned_with_on_disk_is_what_prepared_text_takes(tmp_path: Path, tokenizer: Any) -> None:
    _, statistics = source(tmp_path).prepare("train", tokenizer, tmp_path / "rows")
    size = sum(path.stat().st_size for path in (tmp_path / "rows").rglob("*.bin"))
    assert 2 < size / statistics["tokens"] <= bytes_a_token(len(tokenizer)) == 3
    assert bytes_a_token(2**16) + 2 == bytes_a_token(2**16 + 1) == 5


class Deadly(Parts):
    """Whose second part ends the process that reads it, as the kernel does where memory is short."""

    chat, spread = False, True

    def __len__(self) -> int:
        return 2

    def batches(self, number: int, found: Counter[str]) -> Iterator[Batch]:
        if number:
            os.kill(os.getpid(), signal.SIGKILL)
        yield Batch(["text"], [1.0], ["here"])

    def check(self, found: Counter[str]) -> None: ...


def test_a_process_that_is_killed_is_told_and_leaves_what_is_finished(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(Refusal, match=r"data\.workers=2: a process that tokenizes was killed.*run it again"):
        prepare(Deadly, tokenizer, Documents(workers=2), folder=tmp_path / "rows")
    assert not (tmp_path / "rows").exists()


@dataclass
class Waiting(Deadly):
    """Whose parts tell which process reads them, and do not end."""

    folder: str = ""

    def batches(self, number: int, found: Counter[str]) -> Iterator[Batch]:
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(120)
        yield Batch(["text"], [1.0], ["here"])


@pytest.mark.slow
def test_processes_end_with_whoever_asked_for_them_however_it_ends(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "pids").mkdir()
    code = (
        "import sys; from pathlib import Path; from pipeline.data.documents import Documents;"
        "from pipeline.data.packing import prepare; from pipeline.data.tokenizer import load_tokenizer;"
        "from tests.data.test_flat import Waiting; folder = Path(sys.argv[1]);"
        "parts = Waiting(folder=str(folder / 'pids'));"
        "prepare(lambda: parts, load_tokenizer(folder / 'tokenizer'), Documents(workers=2), folder=folder / 'rows')"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    while len(pids := [int(path.name) for path in (tmp_path / "pids").iterdir()]) < 2:
        assert asking.poll() is None
        time.sleep(0.1)
    asking.kill()
    asking.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in pids):  # else the test's own limit ends it
        time.sleep(0.1)


# Best fit


@pytest.mark.parametrize("seed", range(20))
def test_pieces_placed_by_lengths_are_where_they_are_one_by_one(seed: int) -> None:
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(1, 200))
    lengths = draw.integers(1, capacity + 1, 500) if seed % 2 else np.minimum(1 + draw.geometric(0.1, 500), capacity)
    assert best_fit_decreasing(lengths, capacity).tolist() == by_hand(lengths.tolist(), capacity)
