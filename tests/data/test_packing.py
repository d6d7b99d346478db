"""Texts become rows: nothing lost, nothing twice, nothing predicted across pieces."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, are_progress_bars_disabled
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data import packing, parts
from pipeline.data.documents import Documents, documents
from pipeline.data.packing import best_fit_decreasing, prepare
from pipeline.data.pieces import target_bytes
from pipeline.data.prepared import prepared
from pipeline.data.sequences import Sequences
from pipeline.data.tables import empty_documents
from pipeline.data.tokenizer import ends, load_tokenizer, train_tokenizer
from tests.optional_data import STORIES, needed

ENGLISH = sorted({text.strip() for text in topics.values()}, key=len)[:20]
OTHERS = [
    "Привет, 你好 — naïve café 👩\u200d🚀!\n\n  \uff21",
    "é" * 50,
    " spaces  and\ttabs ",
    "x",
    "e\u0301 €",
]
TEXTS = [*ENGLISH, *OTHERS]

Piece = tuple[tuple[int, ...], tuple[int, ...]]  # its input_ids and its targets


def trained(tmp: Path) -> Any:
    return train_tokenizer(ENGLISH, 600, tmp / "trained")


def adding_its_own_ends(tmp: Path) -> Any:
    """A tokenizer whose post-processor puts <s> and </s> around every text."""
    tokenizer = train_tokenizer(ENGLISH, 500, tmp / "adding")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert tokenizer("x")["input_ids"][0] == ends[0][1]
    assert tokenizer("x")["input_ids"][-1] == ends[1][1]
    return tokenizer


def sentencepiece_style(tmp: Path) -> Any:
    tokenizer = load_tokenizer(needed(STORIES))
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id  # it adds <s> of itself
    return tokenizer


def slow(tmp: Path) -> Any:
    """A tokenizer in Python, which does not say where its tokens stand and adds </s> of itself."""
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert tokenizer.bos_token_id is None
    return tokenizer


@pytest.fixture(scope="module", params=[trained, adding_its_own_ends, sentencepiece_style, slow])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(tmp_path_factory.mktemp("tokenizer"))


def rows_of(tmp: Path, tokenizer: Any, texts: list[str] = TEXTS, **fields: Any) -> tuple[Sequences, dict[str, Any]]:
    return prepare(Dataset.from_dict({"text": texts}), tokenizer, Documents(**fields), folder=tmp / "rows")


def pieces_of(rows: Iterable[dict[str, Any]]) -> list[Piece]:
    """The rows taken apart again, by their positions alone."""
    pieces = []
    for row in rows:
        ids, positions, targets = (row[name] for name in ("input_ids", "position_ids", "targets"))
        begins = [i for i, position in enumerate(positions) if position == 0]
        for begin, end in pairwise([*begins, len(ids)]):
            assert positions[begin:end] == list(range(end - begin))
            pieces.append((tuple(ids[begin:end]), tuple(targets[begin:end])))
    return pieces


@pytest.mark.parametrize("max_length", [2, 7, 128, 100_000])
def test_every_token_after_begin_is_a_target_once_and_the_targets_decode_to_the_text(
    tmp_path: Path, tokenizer: Any, max_length: int
) -> None:
    rows, statistics = rows_of(tmp_path, tokenizer, max_length=max_length, packing=False)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    pieces = iter(pieces_of(rows))
    for text in TEXTS:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        read: list[int] = []
        last = begin
        while not read or read[-1] != tokenizer.eos_token_id:
            ids, targets = next(pieces)
            assert ids[0] == last  # windows overlap by one token
            read += targets[:-1]
            last = ids[-1]
        assert read == [*expected, tokenizer.eos_token_id]
        assert tokenizer.decode(read[:-1]) == text
    assert next(pieces, None) is None
    assert statistics["documents"] == len(TEXTS)
    assert statistics["pieces"] == statistics["sequences"] == len(rows)


@pytest.mark.parametrize("max_length", [2, 7, 64, 513])
def test_packing_loses_no_piece_splits_none_and_fills_no_row_beyond_its_length(
    tmp_path: Path, tokenizer: Any, max_length: int
) -> None:
    unpacked, before = rows_of(tmp_path / "unpacked", tokenizer, max_length=max_length, packing=False)
    packed, after = rows_of(tmp_path / "packed", tokenizer, max_length=max_length)
    assert sorted(pieces_of(packed)) == sorted(pieces_of(unpacked))
    for row in packed:
        lengths = {len(row[name]) for name in ("input_ids", "position_ids", "targets")}
        assert len(lengths) == 1
        assert lengths.pop() <= max_length
    for name in ("documents", "pieces", "tokens", "supervised", "bytes"):
        assert before[name] == after[name]
    assert after["sequences"] == len(packed) <= before["sequences"] == before["pieces"] == len(unpacked)


def test_nothing_is_predicted_across_pieces(tmp_path: Path, tokenizer: Any) -> None:
    rows, _ = rows_of(tmp_path, tokenizer, max_length=96)
    assert any(row["position_ids"].count(0) > 1 for row in rows)
    for ids, targets in pieces_of(rows):
        assert targets == (*ids[1:], IGNORED)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("max_length", [2, 7, 128])
def test_bytes_add_up_to_the_texts(tmp_path: Path, tokenizer: Any, max_length: int, packed: bool) -> None:
    rows, statistics = rows_of(tmp_path, tokenizer, max_length=max_length, packing=packed)
    assert sum(rows["bytes"]) == statistics["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert min(rows["bytes"]) >= 0


def test_bytes_of_a_row_are_those_its_own_targets_stand_for(tmp_path: Path, plain: Any) -> None:
    english = [text for text in TEXTS if text.isascii()]
    rows, _ = rows_of(tmp_path, plain, english, max_length=50)
    for row in rows:
        targets = [token for token in row["targets"] if token not in (IGNORED, plain.eos_token_id)]
        assert row["bytes"] == len(plain.decode(targets).encode())


def test_bytes_are_counted_once_however_tokens_overlap() -> None:
    """Of a character split over tokens each says it covers it all; trimmed offsets can even go back."""
    text = "a é\u20ac z"
    assert len(text.encode()) == 9
    offsets = [(0, 1), (2, 3), (2, 3), (1, 2), (3, 4), (5, 6)]
    assert target_bytes(text, offsets).tolist() == [1, 3, 0, 0, 3, 2, 0]
    assert target_bytes(text, offsets[:-1]).tolist() == [1, 3, 0, 0, 3, 2]


def test_supervised_counts_the_targets_of_each_row(tmp_path: Path, plain: Any) -> None:
    rows, statistics = rows_of(tmp_path, plain, max_length=64)
    for row in rows:
        assert row["supervised"] == sum(token != IGNORED for token in row["targets"])
    assert statistics["supervised"] == sum(rows["supervised"])
    assert statistics["tokens"] == sum(map(len, rows["input_ids"]))
    assert statistics["packing_efficiency"] == statistics["tokens"] / (64 * len(rows)) > 0.9


def test_rows_stand_in_the_order_of_the_documents_they_begin_with(tmp_path: Path, plain: Any) -> None:
    first_of = {pieces: i for i, pieces in enumerate(pieces_of(rows_of(tmp_path / "a", plain, packing=False)[0]))}
    rows, _ = rows_of(tmp_path / "b", plain)
    firsts = [min(first_of[piece] for piece in pieces_of([row])) for row in rows]
    assert firsts == sorted(firsts)


# Best fit


def by_hand(lengths: list[int], capacity: int) -> list[int]:
    """What is left in each row after best-fit decreasing, the long way: look at every row for every piece."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(left) if room >= length]
        if not fitting:
            left.append(capacity)
            fitting = [len(left) - 1]
        left[min(fitting, key=lambda row: left[row])] -= length
    return sorted(left)


@pytest.mark.parametrize("capacity", [8, 100, 1000])
def test_best_fit_decreasing_puts_the_longest_first_into_the_fullest_row(capacity: int) -> None:
    random = np.random.default_rng(capacity)
    for count in (1, 2, 10, 300):
        lengths = random.integers(1, capacity + 1, count)
        row_of = best_fit_decreasing(lengths, capacity)
        loads = np.bincount(row_of, weights=lengths)
        assert sorted(capacity - loads) == by_hand(lengths.tolist(), capacity)
        firsts = [row_of.tolist().index(row) for row in range(len(loads))]
        assert firsts == sorted(firsts)


def test_best_fit_decreasing_numbers_rows_by_their_first_piece() -> None:
    assert best_fit_decreasing(np.array([3, 5, 2, 8, 3, 2]), 8).tolist() == [0, 0, 1, 2, 1, 1]


def test_best_fit_decreasing_finds_the_row_among_very_many() -> None:
    """Looking at every row would take minutes here."""
    lengths = np.concatenate([np.full(100_000, 2048), np.arange(1, 4096), np.arange(4095, 0, -1)])
    loads = np.bincount(best_fit_decreasing(lengths, 4096), weights=lengths)
    assert len(loads) == 50_000 + 4095
    assert set(loads) == {4096}


def test_no_piece_makes_no_row() -> None:
    assert best_fit_decreasing(np.array([], dtype=np.int64), 8).tolist() == []


# The folder


def test_rows_are_prepared_once_and_then_only_opened(tmp_path: Path, plain: Any) -> None:
    rows, statistics = rows_of(tmp_path, plain)
    nothing: Any = None
    again, remembered = prepare(nothing, nothing, Documents(), folder=tmp_path / "rows")
    assert again[:] == rows[:]
    assert remembered == statistics == json.loads((tmp_path / "rows" / "statistics.json").read_text())
    assert prepared(tmp_path / "rows")[0][:] == rows[:]


def test_rows_are_memory_mapped_from_the_folder_and_leave_nothing_elsewhere(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    rows, _ = rows_of(tmp_path, plain)
    held = rows.arrays(0)["input_ids"] if len(rows._pieces(0)[0]) == 1 else rows._shard("input_ids", 0)
    assert not held.flags.owndata
    assert rows.folder == tmp_path / "rows"
    assert not home.exists()
    left = {path.name for path in tmp_path.iterdir() if path.suffix != ".lock"}
    assert left == {"rows", ".rows.hashes.json"}  # the latter: what its seal need not read again


def test_preparing_few_documents_is_quiet(tmp_path: Path, plain: Any, capfd: pytest.CaptureFixture[str]) -> None:
    rows_of(tmp_path, plain, ["word " * 5000])  # longer than any model, which transformers likes to warn of
    assert capfd.readouterr() == ("", "")
    assert not are_progress_bars_disabled()


def test_what_a_killed_process_left_is_written_anew(tmp_path: Path, plain: Any) -> None:
    (tmp_path / ".rows.partial" / "sequences").mkdir(parents=True)
    (tmp_path / ".rows.partial" / "sequences" / "data-00000-of-00001.arrow").write_text("half")
    rows, _ = rows_of(tmp_path, plain)
    assert sum(rows["bytes"]) == sum(len(text.encode()) for text in TEXTS)
    assert not (tmp_path / ".rows.partial").exists()


def test_a_failure_leaves_no_folder_behind_that_looks_whole(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(packing, "index", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rows_of(tmp_path, plain)
    assert not (tmp_path / "rows").exists()
    assert not are_progress_bars_disabled()
    assert len(rows_of(tmp_path, plain)[0]) > 0


def test_two_that_ask_at_once_get_rows_written_once(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    index = packing.index
    monkeypatch.setattr(packing, "index", lambda *given, **words: (written.append(1), index(*given, **words)))
    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(lambda _: rows_of(tmp_path, plain), range(2)))
    assert len(written) == 1
    assert both[0][0][:] == both[1][0][:]


@pytest.mark.parametrize(("name", "value"), [("PART_BYTES", 1500), ("_BATCH_BYTES", 1000), ("_BATCH_DOCUMENTS", 3)])
def test_rows_made_some_at_a_time_are_the_same_rows(
    tmp_path: Path, plain: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    at_once, statistics = rows_of(tmp_path / "at-once", plain)
    monkeypatch.setattr(parts, name, value)
    in_parts, same = rows_of(tmp_path / "in-parts", plain)
    assert in_parts[:] == at_once[:]
    assert same == statistics


# The edges


def test_empty_documents_are_counted_wherever_they_are_found(tmp_path: Path, plain: Any) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["one", "", " ", "two"]))
    dataset = documents(Documents(train=str(path), holdout=0), "train")
    assert empty_documents(dataset) == 2
    _, statistics = prepare(dataset, plain, Documents(), folder=tmp_path / "rows")
    assert (statistics["documents"], statistics["empty"], statistics["pieces"]) == (2, 2, 2)
    _, statistics = rows_of(tmp_path / "direct", plain, ["one", "", " ", "two"])
    assert (statistics["empty"], statistics["pieces"]) == (2, 2)


@pytest.mark.parametrize("texts", [[], ["", " "]])
@pytest.mark.parametrize("packed", [True, False])
def test_no_text_gives_no_rows(tmp_path: Path, plain: Any, texts: list[str], packed: bool) -> None:
    rows, statistics = rows_of(tmp_path, plain, texts, packing=packed)
    assert len(rows) == statistics["sequences"] == statistics["bytes"] == statistics["supervised"] == 0
    assert rows.column_names == ["input_ids", "position_ids", "targets", "supervised", "bytes"]


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path, plain: Any) -> None:
    plain.save_pretrained(tmp_path)
    endless = load_tokenizer(tmp_path)
    endless.eos_token = None
    with pytest.raises(Refusal, match="the tokenizer has no end token, so no text could end; set its eos_token"):
        rows_of(tmp_path, endless)


def test_the_same_texts_give_the_same_rows(tmp_path: Path, plain: Any) -> None:
    assert rows_of(tmp_path / "one", plain)[0][:] == rows_of(tmp_path / "two", plain)[0][:]


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_is_known_by_its_document(tokenizer: Any, packing: bool, tmp_path: Path) -> None:
    """Also of texts that end where a window does, and of those that are left out as empty."""
    texts = [*TEXTS[:12], "  ", *TEXTS[12:], *("a b c " * count for count in range(1, 40))]
    rows, _ = rows_of(tmp_path, tokenizer, texts, max_length=16, packing=packing)
    begin, _ = ends(tokenizer, "the tokenizer")
    documents = rows.documents(begin)
    found: dict[int, int] = {}
    for number in range(len(rows)):
        row, of = rows.arrays(number), rows.document_of_tokens(number, documents)
        for target, document in zip(row["targets"].tolist(), of.tolist(), strict=True):
            found[document] = found.get(document, 0) + (target != IGNORED)
    read = [text for text in texts if text.strip()]
    counts = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in read]
    assert [found[document] for document in range(len(read))] == counts
    view = rows.select([len(rows) - 1])
    assert np.array_equal(view.document_of_tokens(0, documents), rows.document_of_tokens(len(rows) - 1, documents))
