"""Documents → rows: tokenize, cut into pieces, fill rows with pieces.

A row holds three lists of one length, at most `max_length`, and two numbers, all int32:

    input_ids
    position_ids   from 0 again with every piece
    targets        the next token of the same piece, or -100 where there is none or it is not supervised
    supervised     how many targets are not -100
    bytes          of the text, in UTF-8, that the supervised targets stand for

A piece is a window of a text, or a conversation. A text is begin + tokens + end, and its windows overlap by
one token, so that all after begin is a target exactly once. A conversation is cut off, never into windows.
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
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Refusal
from pipeline.data.corpora import Conversation, Data, conversation, empty_documents

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
STATISTICS = "statistics.json"
BYTES_AT_ONCE = 2**23  # of documents, tokenized together: tokens with their places take 100 times the memory
TOKENS_AT_ONCE = 2**22  # in rows, written together

Ints = NDArray[np.integer[Any]]
Pieces = dict[str, list[Any]]  # columns input_ids, targets, supervised, bytes
Cutter = Callable[[dict[str, list[Any]], list[int]], Pieces]


def prepare(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data, *, folder: Path
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `documents` (a column `text` or `messages`), memory mapped from `folder`; their statistics.

    A folder that exists is whole and is only opened. Else it is written aside and renamed; of several
    processes that ask at once one writes and the others wait. Rows stand in the order of their first piece.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            with _progress(shown=len(documents) > 100_000):
                _build(documents, tokenizer, data, aside)
            os.rename(aside / "rows", folder)
            shutil.rmtree(aside)
    return prepared(folder)


def prepared(folder: Path) -> tuple[Dataset, dict[str, Any]]:
    """Rows that `prepare` wrote, memory mapped, and their statistics."""
    from datasets import load_from_disk

    return load_from_disk(str(folder)), json.loads((folder / STATISTICS).read_text())


def chat_template(tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
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


def _build(documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data, aside: Path) -> None:
    """Write aside/rows. Whatever else comes to lie in `aside` is scratch."""
    import pyarrow.compute as pc
    from datasets import Dataset

    tally: Counter[str] = Counter()
    cutter = _conversation_cutter if "messages" in documents.column_names else _text_cutter
    features = _features("input_ids", "targets")
    bytes_each = documents.data.nbytes / max(1, documents.data.num_rows)
    pieces = documents.map(
        cutter(tokenizer, data, tally),
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
    lengths = pc.list_value_length(pieces.data.column("input_ids")).to_numpy()
    row_of = best_fit_decreasing(lengths, data.max_length) if data.packing else np.arange(len(lengths))
    rows = _fill(pieces, lengths, row_of, data.max_length, aside / "rows.arrow")
    # Without rows datasets would write no shard at all, and then not open what it wrote.
    rows.save_to_disk(str(aside / "rows"), num_shards=None if len(rows) else 1)
    tokens = int(lengths.sum())
    statistics = {
        "documents": len(documents),
        "empty": empty_documents(documents) + tally["empty"],
        "truncated": tally["truncated"],
        "unsupervised": tally["unsupervised"],
        "pieces": len(pieces),
        "rows": len(rows),
        "tokens": tokens,
        "supervised": pc.sum(rows.data.column("supervised")).as_py() or 0,
        "bytes": pc.sum(rows.data.column("bytes")).as_py() or 0,
        "packing_efficiency": tokens / max(1, len(rows) * data.max_length),
    }
    (aside / "rows" / STATISTICS).write_text(json.dumps(statistics, indent=2) + "\n")


def _fill(pieces: Dataset, lengths: Ints, row_of: Ints, max_length: int, path: Path) -> Dataset:
    """Write the rows to an Arrow file, each row's pieces in their order."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    features = _features("input_ids", "position_ids", "targets")
    order = np.argsort(row_of, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of))])  # of each row, in `order`
    arrow = pieces.with_format("arrow")
    at_once = TOKENS_AT_ONCE // max_length + 1
    with ArrowWriter(features=features, path=str(path)) as writer:
        for first in range(0, len(starts) - 1, at_once):
            bounds = starts[first : first + at_once + 1]
            chosen = order[bounds[0] : bounds[-1]]
            bounds = bounds - bounds[0]
            table = arrow[chosen]
            ends = np.cumsum(lengths[chosen])
            edges = pa.array(np.concatenate([[0], ends])[bounds], pa.int32())
            columns = {name: table[name].combine_chunks().flatten() for name in ("input_ids", "targets")}
            columns["position_ids"] = np.arange(ends[-1]) - np.repeat(ends - lengths[chosen], lengths[chosen])
            cells = {
                name: pa.ListArray.from_arrays(edges, pa.array(values, pa.int32())) for name, values in columns.items()
            } | {name: np.add.reduceat(table[name].to_numpy(), bounds[:-1]) for name in ("supervised", "bytes")}
            writer.write_table(pa.table({name: cells[name] for name in features}, schema=features.arrow_schema))
        writer.finalize()
    return Dataset.from_file(str(path))


def _features(*lists: str) -> Features:
    from datasets import Features, List, Value

    numbers = {name: Value("int32") for name in ("supervised", "bytes")}
    return Features({name: List(Value("int32")) for name in lists} | numbers)


# Texts


def _text_cutter(tokenizer: PreTrainedTokenizerBase, data: Data, tally: Counter[str]) -> Cutter:
    end = tokenizer.eos_token_id
    if end is None:
        raise Refusal("the tokenizer has no end token, so no text could end; set its eos_token")
    begin = end if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def cut(batch: dict[str, list[Any]], indices: list[int]) -> Pieces:
        pieces: Pieces = {"input_ids": [], "targets": [], "supervised": [], "bytes": []}
        texts = [text for text in batch["text"] if text.strip()]
        tally["empty"] += len(batch["text"]) - len(texts)
        for text, (tokens, offsets) in zip(texts, _tokenized(tokenizer, texts), strict=True):
            ids = np.array([begin, *tokens, end])
            sizes = _target_bytes(text, offsets)
            for at in range(0, len(ids) - 1, data.max_length - 1):
                window = ids[at : at + data.max_length]
                pieces["input_ids"].append(window)
                pieces["targets"].append(np.append(window[1:], IGNORED))
                pieces["supervised"].append(len(window) - 1)
                pieces["bytes"].append(sizes[at : at + data.max_length - 1].sum())
        return pieces

    return cut


def _tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: list[str]
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
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


def _conversation_cutter(tokenizer: PreTrainedTokenizerBase, data: Data, tally: Counter[str]) -> Cutter:
    template = chat_template(tokenizer, data)
    if not tokenizer.is_fast:
        raise Refusal("the data are conversations, which need a fast tokenizer (with a tokenizer.json)")

    def cut(batch: dict[str, list[Any]], indices: list[int]) -> Pieces:
        pieces: Pieces = {"input_ids": [], "targets": [], "supervised": [], "bytes": []}
        rendered = []
        for index, messages in zip(indices, batch["messages"], strict=True):
            where = f"conversation {index}"
            rendered.append(_rendered(tokenizer, template, conversation(messages, where), where))
        tokenized = _tokenized(tokenizer, [text for text, _ in rendered])
        for (text, spans), (tokens, offsets) in zip(rendered, tokenized, strict=True):
            ids = np.array(tokens)
            # Inside are the starts before which an odd number of spans' ends lie: [from, to, from, to, ...]
            inside = np.searchsorted(np.ravel(spans), [start for start, _ in offsets], side="right") % 2 == 1
            sizes = np.where(np.isin(ids, tokenizer.all_special_ids), 0, _target_bytes(text, offsets)[:-1])
            tally["truncated"] += len(ids) > data.max_length
            ids, inside, sizes = (array[: data.max_length] for array in (ids, inside, sizes))
            supervised = int(inside[1:].sum())
            if not supervised:
                tally["unsupervised"] += 1
                continue
            pieces["input_ids"].append(ids)
            pieces["targets"].append(np.append(np.where(inside[1:], ids[1:], IGNORED), IGNORED))
            pieces["supervised"].append(supervised)
            pieces["bytes"].append(sizes[1:][inside[1:]].sum())
        return pieces

    return cut


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
def _progress(shown: bool) -> Iterator[None]:
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
