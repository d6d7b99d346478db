"""Packing: packed sequences are filled with pieces of documents.

A sequence holds three lists of one length, at most `max_length`, and two numbers, all int32:

    input_ids
    position_ids   from 0 again with every piece
    targets        the next token of the same piece, or -100 where there is none or it is not supervised
    supervised     how many targets are not -100
    bytes          of the text, in UTF-8, that the supervised targets stand for

With `data.weight_column` a sequence also has

    weights        float32, beside the targets: what each counts in the loss, 0 where there is none
    weight         their sum, float64

and with a teacher of another tokenizer, int32 again,

    teacher_input_ids      the sequence's pieces once more, in the teacher's tokens
    teacher_position_ids   from 0 again with every piece
    spans                  four numbers for each: the place in input_ids whose target is the span's first token,
                           the student's tokens, the place in teacher_input_ids that predicts the teacher's first
                           token of the span, the teacher's tokens. Both sides' tokens are the same bytes of text.
"""

from __future__ import annotations

import json
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.pieces import Found, Ints, Teacher, conversation_pieces, no_pieces, text_pieces
from pipeline.data.prepared import SPELLINGS, STATISTICS, once
from pipeline.data.source import DataSource
from pipeline.data.tables import empty_documents

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

BYTES_AT_ONCE = 2**23  # of documents, tokenized together: tokens with their places take 100 times the memory
TOKENS_AT_ONCE = 2**22  # in sequences, written together


def prepare(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSource,
    *,
    folder: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """The sequences of `documents` (a column `text` or `messages`), memory mapped from `folder`; their statistics.

    With data.weight_column the documents also have a column `weight`. A `teacher_tokenizer` aligns the sequences with
    the teacher's tokens (see the module); statistics then count `spans`, `spanned` (supervised tokens that lie in
    spans), `long_spans` (left out, see alignment.LONGEST) and `teacher_tokens`.

    Sequences stand in the order of their first piece.
    """

    def build(aside: Path) -> None:
        with progress(shown=len(documents) > 100_000):
            _build(documents, tokenizer, data, aside, teacher_tokenizer)

    return once(folder, build)


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The sequence of every piece: longest piece first, each into the fullest sequence that still takes it.

    Sequences are numbered by their first piece. O(n log n); needs every length to be at most `capacity`.
    """
    sequence_of = np.zeros(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # what is left in some open sequence, each value once, ascending
    open_with: dict[int, list[int]] = {}
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            sequence, room = count, capacity
            count += 1
        else:
            room = rooms[at]
            sequence = open_with[room].pop()
            if not open_with[room]:
                del rooms[at], open_with[room]
        sequence_of[piece] = sequence
        room -= length
        if room and room not in open_with:
            insort(rooms, room)
        if room:
            open_with.setdefault(room, []).append(sequence)
    _, first_piece = np.unique(sequence_of, return_index=True)
    return np.argsort(np.argsort(first_piece))[sequence_of]


def _build(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: DataSource,
    aside: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write aside/sequences. Whatever else comes to lie in `aside` is scratch."""
    from datasets import Dataset

    tally = Found()
    maker = conversation_pieces if "messages" in documents.column_names else text_pieces
    teacher = None if teacher_tokenizer is None else Teacher(teacher_tokenizer, tokenizer, tally)
    features = features_of(*no_pieces(data, teacher))
    bytes_each = documents.data.nbytes / max(1, documents.data.num_rows)
    pieces = documents.map(
        maker(tokenizer, data, tally, teacher),
        batched=True,
        batch_size=int(min(1000, max(1, BYTES_AT_ONCE / max(1, bytes_each)))),
        with_indices=True,
        remove_columns=documents.column_names,
        features=features,
        num_proc=None,  # a fast tokenizer's own threads use every core already
        # With both named, datasets neither hashes the tokenizer nor writes under the user's home.
        cache_file_name=str(aside / "pieces.arrow"),
        new_fingerprint="pieces",
        load_from_cache_file=False,
        desc="tokenizing",
    )
    if not len(pieces):  # `map` gives an empty dataset back as it was
        pieces = Dataset.from_dict({name: [] for name in features}, features=features)
    counted = {
        "documents": len(documents),
        "empty": empty_documents(documents) + tally["empty"],
        "truncated": tally["truncated"],
        "cut_to_nothing": tally["cut_to_nothing"],
        "unsupervised": tally["unsupervised"],
        **tally.spellings,
    }
    also = {name: tally[name] for name in ("spans", "spanned", "long_spans", "teacher_tokens")} if teacher else {}
    write_sequences(pieces, aside, max_length=data.max_length, packing=data.packing, counted=counted, also=also)


def write_sequences(
    pieces: Dataset,
    aside: Path,
    *,
    max_length: int,
    packing: bool,
    counted: dict[str, Any],
    also: dict[str, Any] | None = None,
) -> None:
    """Fill sequences with pieces and write aside/sequences; `counted` and `also` go into their statistics."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(pieces.data.column("input_ids")).to_numpy()
    sequence_of = best_fit_decreasing(lengths, max_length) if packing else np.arange(len(lengths))
    sequences = _fill(pieces, sequence_of, max_length, aside / "sequences.arrow")
    # Without sequences datasets would write no shard at all, and then not open what it wrote.
    sequences.save_to_disk(str(aside / "sequences"), num_shards=None if len(sequences) else 1)
    tokens = int(lengths.sum())
    statistics = {
        SPELLINGS: 0,
        **counted,
        "pieces": len(pieces),
        "sequences": len(sequences),
        "tokens": tokens,
        "supervised": pc.sum(sequences.data.column("supervised")).as_py() or 0,
        "bytes": pc.sum(sequences.data.column("bytes")).as_py() or 0,
        "packing_efficiency": tokens / max(1, len(sequences) * max_length),
    }
    if "weight" in sequences.column_names:
        statistics["weight"] = pc.sum(sequences.data.column("weight")).as_py() or 0.0
    statistics |= also or {}
    (aside / "sequences" / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")


def _fill(pieces: Dataset, sequence_of: Ints, max_length: int, path: Path) -> Dataset:
    """Write the sequences to an Arrow file, the pieces of each in their order."""
    import pyarrow as pa
    import pyarrow.compute as pc
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    weighted, taught = "weights" in pieces.features, "spans" in pieces.features
    features = features_of(
        *("input_ids", "position_ids", "targets"),
        *(["weights"] if weighted else []),
        *(["teacher_input_ids", "teacher_position_ids"] if "teacher_input_ids" in pieces.features else []),
        *(name for name in ("teacher_targets", "spans") if name in pieces.features),
        *("supervised", "bytes"),
        *(["weight"] if weighted else []),
    )
    order = np.argsort(sequence_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(sequence_of))])  # of each sequence, in `order`
    arrow = pieces.with_format("arrow")
    at_once = TOKENS_AT_ONCE // max_length + 1
    with ArrowWriter(features=features, path=str(path)) as writer:
        for first in range(0, len(starts) - 1, at_once):
            bounds = starts[first : first + at_once + 1]
            table = arrow[order[bounds[0] : bounds[-1]]]
            bounds = bounds - bounds[0]
            cells: dict[str, Any] = {
                name: np.add.reduceat(table[name].to_numpy(), bounds[:-1]) for name in ("supervised", "bytes")
            }
            lists: dict[str, NDArray[Any]] = {}  # all values of a column
            edges: dict[str, Ints] = {}  # where in them the pieces begin, and the last ends
            for name in set(table.column_names) - set(cells):
                edges[name] = np.concatenate([[0], np.cumsum(pc.list_value_length(table[name]).to_numpy())])
                lists[name] = table[name].combine_chunks().flatten().to_numpy()
            for name, ids in (("position_ids", "input_ids"), ("teacher_position_ids", "teacher_input_ids")):
                if ids in edges and name not in edges:  # a teacher can see several texts in one piece
                    edges[name] = edges[ids]
                    lists[name] = np.arange(edges[ids][-1]) - np.repeat(edges[ids][:-1], np.diff(edges[ids]))
            if taught:
                spans = lists["spans"].reshape(-1, 4).copy()
                for place, ids in ((0, "input_ids"), (2, "teacher_input_ids")):
                    begins = edges[ids][:-1]
                    in_sequence = begins - np.repeat(begins[bounds[:-1]], np.diff(bounds))
                    spans[:, place] += np.repeat(in_sequence, np.diff(edges["spans"]) // 4)
                lists["spans"] = spans.ravel()
            if weighted:
                cells["weight"] = np.add.reduceat(lists["weights"].astype(np.float64), edges["weights"][bounds[:-1]])
            for name, values in lists.items():
                kind = features.arrow_schema.field(name).type.value_type
                cells[name] = pa.ListArray.from_arrays(
                    pa.array(edges[name][bounds], pa.int32()), pa.array(values, kind)
                )
            writer.write_table(pa.table({name: cells[name] for name in features}, schema=features.arrow_schema))
        writer.finalize()
    return Dataset.from_file(str(path))


def features_of(*names: str) -> Features:
    from datasets import Features, List, Value

    numbers = {"supervised": Value("int32"), "bytes": Value("int32"), "weight": Value("float64")}
    floats = {"weights": List(Value("float32"))}
    return Features({name: (numbers | floats).get(name, List(Value("int32"))) for name in names})


@contextmanager
def progress(shown: bool) -> Iterator[None]:
    """Let datasets draw its progress bars, or not; they are noise where the work takes seconds."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    silenced = not shown and not are_progress_bars_disabled()
    if silenced:
        disable_progress_bars()
    try:
        yield
    finally:
        if silenced:
            enable_progress_bars()
