"""Documents → rows: tokenize, cut into pieces, fill rows with pieces.

A row holds three lists of one length, at most `max_length`, and two numbers, all int32:

    input_ids
    position_ids   from 0 again with every piece
    targets        the next token of the same piece, or -100 where there is none or it is not supervised
    supervised     how many targets are not -100
    bytes          of the text, in UTF-8, that the supervised targets stand for

A piece is a window of a text, or a conversation. A text is begin + tokens + end, and its windows overlap by
one token, so that all after begin is a target exactly once. A conversation is cut off, never into windows.

With `data.weight_column` a row also has

    weights        float32, beside the targets: what each counts in the loss, 0 where there is none
    weight         their sum, float64

and with a teacher of another tokenizer, int32 again,

    teacher_input_ids      the row's pieces once more, in the teacher's tokens
    teacher_position_ids   from 0 again with every piece
    spans                  four numbers for each: the place in input_ids whose target is the span's first token,
                           the student's tokens, the place in teacher_input_ids that predicts the teacher's first
                           token of the span, the teacher's tokens. Both sides' tokens are the same bytes of text.

The teacher's piece of a text is those of its tokens of the text that lie within the student's piece; begin + these, if
the piece begins the text, and + end, if it ends it. So tokens are those of the whole text, not cut anew at every
window, and the teacher sees just the text that the student sees: with identical tokenizers, the very same pieces.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Refusal
from pipeline.data.alignment import Aligned, Aligner
from pipeline.data.corpora import Conversation, Data, conversation, empty_documents

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
STATISTICS = "statistics.json"
BYTES_AT_ONCE = 2**23  # of documents, tokenized together: tokens with their places take 100 times the memory
TOKENS_AT_ONCE = 2**22  # in rows, written together

Ints = NDArray[np.integer[Any]]
Tokens = tuple[list[int], list[tuple[int, int]]]  # ids, and where each stands in the text, in characters
_Spoken = tuple[str, list[tuple[int, int]], Tokens]  # a text, where in it the assistant speaks, and its tokens
Pieces = dict[str, list[Any]]  # columns input_ids, targets, supervised, bytes; weights; teacher_input_ids, spans
Cutter = Callable[[dict[str, list[Any]], list[int]], Pieces]


def prepare(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    *,
    folder: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `documents` (a column `text` or `messages`), memory mapped from `folder`; their statistics.

    With data.weight_column the documents also have a column `weight`. A `teacher_tokenizer` aligns the rows with the
    teacher's tokens (see the module); statistics then count `spans`, `spanned` (supervised tokens that lie in spans),
    `long_spans` (left out, see alignment.LONGEST) and `teacher_tokens`.

    Rows stand in the order of their first piece.
    """

    def build(aside: Path) -> None:
        with progress(shown=len(documents) > 100_000):
            _build(documents, tokenizer, data, aside, teacher_tokenizer)

    return once(folder, build)


def once(folder: Path, build: Callable[[Path], None]) -> tuple[Dataset, dict[str, Any]]:
    """The rows in `folder`, which `build(aside)` writes as aside/rows where they are not there yet.

    A folder that exists is whole and is only opened. Else it is written aside and renamed; of several
    processes that ask at once one writes and the others wait.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            build(aside)
            os.rename(aside / "rows", folder)
            shutil.rmtree(aside)
    return prepared(folder)


def prepared(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """Rows that `prepare` wrote, memory mapped, and their statistics."""
    from datasets import load_from_disk

    return load_from_disk(str(folder)), json.loads((folder / STATISTICS).read_text())


def chat_template(tokenizer: PreTrainedTokenizerBase, data: Any) -> str:
    """The template conversations are rendered with: data.chat_template's file, or the tokenizer's own."""
    if data.chat_template is not None:
        return Path(data.chat_template).expanduser().read_text(encoding="utf-8")
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise Refusal(
            "the data are conversations and the tokenizer has no chat template; give data.chat_template=FILE"
        ) from error


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The row of every piece: longest piece first, each into the fullest row that still takes it.

    Rows are numbered by their first piece. O(n log n); needs every length to be at most `capacity`.
    """
    row_of = np.zeros(len(lengths), dtype=np.int64)
    rooms: list[int] = []  # what is left in some open row, each value once, ascending
    rows_with: dict[int, list[int]] = {}
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = count, capacity
            count += 1
        else:
            room = rooms[at]
            row = rows_with[room].pop()
            if not rows_with[room]:
                del rooms[at], rows_with[room]
        row_of[piece] = row
        room -= length
        if room and room not in rows_with:
            insort(rooms, room)
        if room:
            rows_with.setdefault(room, []).append(row)
    _, first_piece = np.unique(row_of, return_index=True)
    return np.argsort(np.argsort(first_piece))[row_of]


def _build(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    aside: Path,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Write aside/rows. Whatever else comes to lie in `aside` is scratch."""
    from datasets import Dataset

    tally: Counter[str] = Counter()
    cutter = _conversation_cutter if "messages" in documents.column_names else _text_cutter
    teacher = None if teacher_tokenizer is None else _Teacher(teacher_tokenizer, tokenizer, tally)
    features = features_of(*_no_pieces(data, teacher))
    bytes_each = documents.data.nbytes / max(1, documents.data.num_rows)
    pieces = documents.map(
        cutter(tokenizer, data, tally, teacher),
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
    if not len(pieces):  # `map` gives a dataset without rows back as it was
        pieces = Dataset.from_dict({name: [] for name in features}, features=features)
    counted = {
        "documents": len(documents),
        "empty": empty_documents(documents) + tally["empty"],
        "truncated": tally["truncated"],
        "unsupervised": tally["unsupervised"],
    }
    also = {name: tally[name] for name in ("spans", "spanned", "long_spans", "teacher_tokens")} if teacher else {}
    write_rows(pieces, aside, max_length=data.max_length, packing=data.packing, counted=counted, also=also)


def write_rows(
    pieces: Dataset,
    aside: Path,
    *,
    max_length: int,
    packing: bool,
    counted: dict[str, Any],
    also: dict[str, Any] | None = None,
) -> None:
    """Fill rows with pieces (see _no_pieces) and write aside/rows; `counted` and `also` go into their statistics."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(pieces.data.column("input_ids")).to_numpy()
    row_of = best_fit_decreasing(lengths, max_length) if packing else np.arange(len(lengths))
    rows = _fill(pieces, row_of, max_length, aside / "rows.arrow")
    # Without rows datasets would write no shard at all, and then not open what it wrote.
    rows.save_to_disk(str(aside / "rows"), num_shards=None if len(rows) else 1)
    tokens = int(lengths.sum())
    statistics = {
        **counted,
        "pieces": len(pieces),
        "rows": len(rows),
        "tokens": tokens,
        "supervised": pc.sum(rows.data.column("supervised")).as_py() or 0,
        "bytes": pc.sum(rows.data.column("bytes")).as_py() or 0,
        "packing_efficiency": tokens / max(1, len(rows) * max_length),
    }
    if "weight" in rows.column_names:
        statistics["weight"] = pc.sum(rows.data.column("weight")).as_py() or 0.0
    statistics |= also or {}
    (aside / "rows" / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")


def _fill(pieces: Dataset, row_of: Ints, max_length: int, path: Path) -> Dataset:
    """Write the rows to an Arrow file, each row's pieces in their order."""
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
    order = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])  # of each row, in `order`
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
                    in_row = begins - np.repeat(begins[bounds[:-1]], np.diff(bounds))
                    spans[:, place] += np.repeat(in_row, np.diff(edges["spans"]) // 4)
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


def _no_pieces(data: Data, teacher: _Teacher | None) -> Pieces:
    pieces: Pieces = {"input_ids": [], "targets": [], "supervised": [], "bytes": []}
    if data.weight_column is not None:
        pieces["weights"] = []
    if teacher:
        pieces |= {"teacher_input_ids": [], "spans": []}
    return pieces


class _Teacher:
    """The teacher's tokenizer; writes its side of every piece."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, student_tokenizer: PreTrainedTokenizerBase, tally: Counter[str]
    ) -> None:
        self.tokenizer, self.tally = tokenizer, tally
        self.aligner = Aligner(student_tokenizer, tokenizer)

    def aligned(self, text: str, student: Tokens, teacher: Tokens) -> Aligned:
        aligned = self.aligner.text(text, student, teacher)
        self.tally["long_spans"] += aligned.dropped
        return aligned

    def add_window(self, pieces: Pieces, aligned: Aligned, at: int, length: int, ids: list[int]) -> None:
        """Beside the student's window of `length` tokens from `at` on, begin being 0; `ids` are the whole text's."""
        begin, end = _ends(self.tokenizer, "the teacher's tokenizer")
        (first, last), spans = aligned.window(at - 1, at - 1 + length)
        # As the student's own windows: begin stands before the text alone. Behind it token i is predicted at i; a
        # later window's first token only predicts, and nothing can be compared at it.
        headed = at == 0 or first >= last
        held = [begin, *ids[first:last]] if headed else list(ids[first:last])
        lost = first if headed else first + 1
        spans = spans - np.array([at, at, lost, lost])
        spans = spans[spans[:, 2] >= 0]
        if at + length == len(aligned.student.starts) + 2:
            spans = np.append(spans, [[length - 2, length - 1, len(held) - 1, len(held)]], axis=0)
            held.append(end)
        self._add(pieces, held, spans)

    def add_conversation(
        self, pieces: Pieces, sides: tuple[_Spoken, _Spoken], contents: list[str], inside: NDArray[np.bool_]
    ) -> None:
        """Beside the student's first len(inside) tokens, of which those `inside` are supervised where predicted."""
        (_, _, (ours, _)), (_, _, (theirs, _)) = sides
        spans, dropped = self.aligner.conversation(*sides, contents)
        self.tally["long_spans"] += dropped
        length = len(inside)
        spans = spans[(spans[:, 1] <= length) & (spans[:, 0] > 0) & (spans[:, 2] > 0)]  # a first token has no predictor
        before = np.concatenate([[0], np.cumsum(inside)])
        spans = spans[before[spans[:, 1]] - before[spans[:, 0]] == spans[:, 1] - spans[:, 0]]
        if length < len(ours):  # the rest of the teacher's conversation, too, is of no use
            alike = ours[:length] == theirs[:length]
            theirs = theirs[: length if alike else max([1, *spans[-1:, 3]])]
        self._add(pieces, theirs, spans - 1)

    def _add(self, pieces: Pieces, ids: list[int], spans: Ints) -> None:
        """`spans` as in Aligned, but in places that predict."""
        counts = spans[:, [1, 3]] - spans[:, [0, 2]]
        pieces["teacher_input_ids"].append(ids)
        pieces["spans"].append(np.stack([spans[:, 0], counts[:, 0], spans[:, 2], counts[:, 1]], axis=1).ravel())
        self.tally["teacher_tokens"] += len(ids)
        self.tally["spans"] += len(spans)
        self.tally["spanned"] += int(counts[:, 0].sum())


# Texts


def _text_cutter(
    tokenizer: PreTrainedTokenizerBase, data: Data, tally: Counter[str], teacher: _Teacher | None
) -> Cutter:
    begin, end = _ends(tokenizer, "the tokenizer")
    if teacher:
        _ends(teacher.tokenizer, "the teacher's tokenizer")

    def cut(batch: dict[str, list[Any]], indices: list[int]) -> Pieces:
        pieces = _no_pieces(data, teacher)
        texts, weights = [], []
        given = batch["weight"] if data.weight_column is not None else [1.0] * len(indices)
        for text, weight in zip(batch["text"], given, strict=True):
            if not text.strip():
                tally["empty"] += 1
            elif not np.float32(weight) > 0:
                tally["unsupervised"] += 1
            else:
                texts.append(text)
                weights.append(weight)
        taught = _tokenized(teacher.tokenizer, texts) if teacher else repeat(None, len(texts))
        for text, weight, ours, theirs in zip(texts, weights, _tokenized(tokenizer, texts), taught, strict=True):
            ids = np.array([begin, *ours[0], end])
            sizes = _target_bytes(text, ours[1])
            aligned = teacher.aligned(text, ours, theirs) if teacher and theirs else None
            for at in range(0, len(ids) - 1, data.max_length - 1):
                window = ids[at : at + data.max_length]
                pieces["input_ids"].append(window)
                pieces["targets"].append(np.append(window[1:], IGNORED))
                pieces["supervised"].append(len(window) - 1)
                pieces["bytes"].append(sizes[at : at + data.max_length - 1].sum())
                if data.weight_column is not None:
                    pieces["weights"].append(np.append(np.full(len(window) - 1, weight), 0))
                if teacher and theirs and aligned:
                    teacher.add_window(pieces, aligned, at, len(window), theirs[0])
        return pieces

    return cut


def _ends(tokenizer: PreTrainedTokenizerBase, whose: str) -> tuple[int, int]:
    """The tokens before and behind a text; a tokenizer without begin puts end there, as its model was taught."""
    end = tokenizer.eos_token_id
    if end is None:
        raise Refusal(f"{whose} has no end token, so no text could end; set its eos_token")
    return end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, end


def _tokenized(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[Tokens]:
    """Tokens of each text and where they stand in it, in characters; nothing is added and nothing cut."""
    if not texts:
        return
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,  # that a text is longer than the model takes is what windows are for
    )
    for i, tokens in enumerate(encoded["input_ids"]):
        if tokenizer.is_fast:
            yield tokens, encoded["offset_mapping"][i]
        else:  # it does not tell: take all tokens of the text as equally long
            places = [len(texts[i]) * k // max(1, len(tokens)) for k in range(len(tokens) + 1)]
            yield tokens, list(pairwise(places))


def _target_bytes(text: str, offsets: list[tuple[int, int]]) -> Ints:
    """UTF-8 bytes that each token adds to the text before it; one entry more for what follows the last token.

    A character of several tokens is counted with the first of them, and what no token covers with the next.
    """
    ends = np.maximum.accumulate([end for _, end in offsets] + [len(text)])
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        size_of = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(int)
        ends = np.concatenate([[0], np.cumsum(size_of)])[ends]
    return np.diff(ends, prepend=0)


# Conversations


def _conversation_cutter(
    tokenizer: PreTrainedTokenizerBase, data: Data, tally: Counter[str], teacher: _Teacher | None
) -> Cutter:
    template = chat_template(tokenizer, data)
    taught_template = _teachers_template(teacher.tokenizer, data) if teacher else ""
    if not tokenizer.is_fast:
        raise Refusal("the data are conversations, which need a fast tokenizer (with a tokenizer.json)")

    def cut(batch: dict[str, list[Any]], indices: list[int]) -> Pieces:
        pieces = _no_pieces(data, teacher)
        places = [f"conversation {index}" for index in indices]
        told = [conversation(messages, where) for messages, where in zip(batch["messages"], places, strict=True)]
        given = batch["weight"] if data.weight_column is not None else [1.0] * len(told)
        sides = _spoken(tokenizer, template, told, places)
        taught = _spoken(teacher.tokenizer, taught_template, told, places) if teacher else repeat(None, len(told))
        for messages, where, weight, side, theirs in zip(told, places, given, sides, taught, strict=True):
            text, spans, (tokens, offsets) = side
            ids = np.array(tokens)
            # Inside are the starts before which an odd number of spans' ends lie: [from, to, from, to, ...]
            passed = np.searchsorted(np.ravel(spans), [start for start, _ in offsets], side="right")
            each = np.append(_turn_weights(messages, len(spans), weight, data, where), 0)
            weights = np.where(passed % 2 == 1, each[passed // 2], 0).astype(np.float32)
            inside = weights > 0
            sizes = np.where(np.isin(ids, tokenizer.all_special_ids), 0, _target_bytes(text, offsets)[:-1])
            tally["truncated"] += len(ids) > data.max_length
            ids, inside, sizes = ids[: data.max_length], inside[: data.max_length], sizes[: data.max_length]
            supervised = int(inside[1:].sum())
            if not supervised:
                tally["unsupervised"] += 1
                continue
            pieces["input_ids"].append(ids)
            pieces["targets"].append(np.append(np.where(inside[1:], ids[1:], IGNORED), IGNORED))
            pieces["supervised"].append(supervised)
            pieces["bytes"].append(sizes[1:][inside[1:]].sum())
            if data.weight_column is not None:
                pieces["weights"].append(np.append(weights[1 : len(ids)], np.float32(0)))
            if teacher and theirs:
                contents = [message["content"] for message in messages if message["role"] == "assistant"]
                _check_parts(len(side[1]), len(contents), "the chat template", where)
                _check_parts(len(theirs[1]), len(contents), "the teacher's chat template", where)
                teacher.add_conversation(pieces, (side, theirs), contents, inside)
        return pieces

    return cut


def _teachers_template(tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    try:
        return chat_template(tokenizer, data)
    except Refusal as error:
        raise Refusal(
            "the data are conversations and the teacher's tokenizer has no chat template; give "
            "data.chat_template=FILE, which then is used for the student and the teacher"
        ) from error


def _spoken(
    tokenizer: PreTrainedTokenizerBase, template: str, told: list[Conversation], places: list[str]
) -> Iterator[_Spoken]:
    """Each conversation as text, where in it the assistant speaks, and its tokens."""
    plain = [[{"role": message["role"], "content": message["content"]} for message in messages] for messages in told]
    rendered = [_rendered(tokenizer, template, *given) for given in zip(plain, places, strict=True)]
    tokenized = _tokenized(tokenizer, [text for text, _ in rendered])
    return ((text, spans, tokens) for (text, spans), tokens in zip(rendered, tokenized, strict=True))


def _check_parts(parts: int, turns: int, whose: str, where: str) -> None:
    if parts != turns:
        raise Refusal(
            f"{where}: {whose} marks {parts} parts where the assistant speaks {turns} times, so its turns cannot be "
            "told apart; give a data.chat_template with one {% generation %} mark around each"
        )


def _turn_weights(messages: Conversation, parts: int, weight: float, data: Data, where: str) -> list[float]:
    """The weight of each part in which the assistant speaks: the conversation's times the message's."""
    each = [float(message.get("weight", 1)) for message in messages if message["role"] == "assistant"]
    if all(one == 1 for one in each):
        return [weight] * parts
    if data.weight_column is None and any(one not in (0, 1) for one in each):
        odd = next(one for one in each if one not in (0, 1))
        raise Refusal(
            f"{where}: a message has weight {odd:g}; without data.weight_column it can be 0 or 1, so name a column of "
            "weights (of 1, if only messages differ)"
        )
    _check_parts(parts, len(each), "the chat template", where)
    return [weight * one for one in each]


def _rendered(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The conversation as text, and where in it the assistant speaks, end of turn included, in characters."""
    from jinja2 import TemplateError

    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", template):
            return _marked(tokenizer, template, messages)
        return _compared(tokenizer, template, messages, where)
    except (TemplateError, TypeError) as error:
        raise Refusal(f"{where}: the chat template does not take it: {error}; mend or drop it") from error


def _marked(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation
) -> tuple[str, list[tuple[int, int]]]:
    """By the template's own {% generation %} marks.

    Not by apply_chat_template's token mask: where a mark begins or ends with a character of no token (a
    space, to tokenizers that trim offsets), it supervises none or all of what follows.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    variables: dict[str, Any] = tokenizer.special_tokens_map
    rendered: Any = render_jinja_template(
        conversations=[messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    (text,), (spans,) = rendered
    return text, spans


def _compared(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: Conversation, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """By the texts before and after each of the assistant's turns; both must begin the whole text."""

    def render(conversations: list[Conversation], prompt: bool) -> Any:
        return tokenizer.apply_chat_template(
            conversations, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )

    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text, *after = render([messages, *(messages[: i + 1] for i in turns)], prompt=False)
    before = render([messages[:i] for i in turns], prompt=True)
    for turn, prompt, through in zip(turns, before, after, strict=True):
        if not (text.startswith(through) and through.startswith(prompt)):
            raise Refusal(
                f"{where}: the chat template writes message {turn} differently once others follow, so the "
                "assistant's part cannot be told; give a data.chat_template with {% generation %} marks"
            )
    return text, [(len(prompt), len(through)) for prompt, through in zip(before, after, strict=True)]


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
