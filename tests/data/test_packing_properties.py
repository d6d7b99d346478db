"""What holds of every packed sequence, whatever the texts."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from models.targets import IGNORED
from pipeline.data.documents import Documents
from pipeline.data.packing import best_fit_decreasing, prepare
from pipeline.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_tokenizer(["the cat sat on the mat, déjà vu " * 9], 300, tmp_path_factory.mktemp("tokenizer"))


def pieces_of(packed: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
    """(input_ids, targets) of every piece; a piece begins where positions begin again."""
    found = []
    for sequence in packed:
        ids, positions, targets = (sequence[name] for name in ("input_ids", "position_ids", "targets"))
        assert len(ids) == len(positions) == len(targets)
        begins = [at for at, position in enumerate(positions) if position == 0]
        assert begins[0] == 0
        for begin, end in pairwise([*begins, len(ids)]):
            assert positions[begin:end] == list(range(end - begin))
            found.append((ids[begin:end], targets[begin:end]))
    return found


TEXTS = st.lists(st.text(max_size=40) | st.text("the cat ", max_size=120), max_size=8)


@settings(max_examples=20)
@given(texts=TEXTS, max_length=st.integers(2, 40), packed=st.booleans())
def test_every_token_of_every_document_is_predicted_once_from_its_own_document(
    tokenizer: Any, texts: list[str], max_length: int, packed: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Documents(max_length=max_length, packing=packed)
        dataset, statistics = prepare(
            Dataset.from_dict({"text": texts}), tokenizer, data, folder=Path(folder) / "packed"
        )
        sequences = list(dataset)
    end = tokenizer.eos_token_id
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    documents = [
        [begin, *tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts if text.strip()
    ]
    assert all(len(sequence["input_ids"]) <= max_length for sequence in sequences)
    windows = Counter(
        tuple(ids[at : at + max_length]) for ids in documents for at in range(0, len(ids) - 1, max_length - 1)
    )
    pieces = pieces_of(sequences)
    assert Counter(tuple(ids) for ids, _ in pieces) == windows
    assert all(targets == [*ids[1:], IGNORED] for ids, targets in pieces)
    predicted = Counter(token for _, targets in pieces for token in targets if token != IGNORED)
    assert predicted == Counter(token for ids in documents for token in ids[1:])
    assert statistics["supervised"] == predicted.total()
    assert statistics["bytes"] == sum(len(text.encode()) for text in texts if text.strip())


@given(st.integers(1, 50).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_bins_hold_every_piece_within_their_room_and_no_two_could_be_one(given: tuple[int, list[int]]) -> None:
    capacity, lengths = given
    bin_of = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    assert len(bin_of) == len(lengths)
    loads = np.bincount(bin_of, weights=lengths) if lengths else np.array([])
    assert ((loads > 0) & (loads <= capacity)).all()
    assert loads.sum() == sum(lengths)
    assert len(loads) < 2 or np.sort(loads)[:2].sum() > capacity
    assert list(dict.fromkeys(bin_of.tolist())) == list(range(len(loads)))  # numbered by their first piece
