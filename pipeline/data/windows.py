"""Texts as windows of tokens, many texts at once: one by one they take longer than tokenizing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from pipeline.data.controls import Controls, Tokens
from pipeline.data.flat import Array, Pieces
from pipeline.data.source import DataSource

_LETTERS_A_TOKEN = 3  # a text of more letters than that times data.max_length is tokenized with the tokens' places


def windows(
    texts: Sequence[str],
    weights: Sequence[float],
    places: Sequence[str],
    controls: Controls,
    ends: tuple[int, int],
    data: DataSource,
) -> Pieces:
    """The pieces of texts, each begin + tokens + end in windows of data.max_length that overlap by one token.

    `ends`: the begin and the end token; `places`: where the texts stand, for what is said of spelled control tokens.
    """
    ids, counts, placed = _tokens(texts, places, controls, data.max_length)
    lengths = counts + 2
    stops = np.cumsum(lengths)
    whole = np.empty(int(lengths.sum()), dtype=np.int64)
    whole[stops - lengths], whole[stops - 1] = ends
    inner = np.ones(len(whole), dtype=np.bool_)
    inner[stops - lengths] = inner[stops - 1] = False
    whole[inner] = ids
    sizes = np.array([len(text) if text.isascii() else len(text.encode()) for text in texts], dtype=np.int64)
    step = data.max_length - 1
    each = -(-(lengths - 1) // step)  # windows of every text
    of_text = np.repeat(np.arange(len(texts)), each)
    if len(of_text) > len(texts):
        at = (np.arange(len(of_text)) - np.repeat(np.cumsum(each) - each, each)) * step  # where a window begins in it
        long = np.minimum(lengths[of_text] - at, data.max_length)
        before = np.cumsum(long) - long
        whole = whole[np.arange(int(long.sum())) + np.repeat((stops - lengths)[of_text] + at - before, long)]
        sizes, lengths = sizes[of_text], long
        first = np.cumsum(each) - each
        for text, tokens in placed.items():
            of_window = np.add.reduceat(target_bytes(texts[text], tokens), np.arange(0, counts[text] + 1, step))
            sizes[first[text] : first[text] + each[text]] = of_window
    pieces = Pieces(whole, lengths, sizes)
    if data.weight_column is not None:
        pieces.weights = np.repeat(np.asarray(weights, dtype=np.float64)[of_text].astype(np.float32), lengths)
        pieces.weights[np.cumsum(lengths) - 1] = 0
    return pieces


def _tokens(
    texts: Sequence[str], places: Sequence[str], controls: Controls, max_length: int
) -> tuple[Array, Array, dict[int, list[tuple[int, int]]]]:
    """Tokens of all texts end to end; how many each has; and, of those of several windows, where their tokens stand."""
    if not controls.plain:
        read: list[Tokens] = list(controls.text_tokens(texts, places))
        counts = np.array([len(ids) for ids, _ in read], dtype=np.int64)
        placed = {at: where for at, (_, where) in enumerate(read) if counts[at] + 2 > max_length}
        return _joined([ids for ids, _ in read], counts), counts, placed
    # Without places a tokenizer is faster, and only a text of several windows needs them.
    long = [at for at, text in enumerate(texts) if len(text) > _LETTERS_A_TOKEN * max_length]
    apart = set(long)
    short = [at for at in range(len(texts)) if at not in apart]
    found: dict[int, Any] = dict(zip(short, controls.encoded([texts[at] for at in short], placed=False), strict=True))
    long += [at for at in short if len(found[at]) + 2 > max_length]
    found |= zip(long, controls.encoded([texts[at] for at in long], placed=True), strict=True)
    counts = np.array([len(found[at]) for at in range(len(texts))], dtype=np.int64)
    placed = {at: found[at].offsets for at in long if counts[at] + 2 > max_length}
    ids = _joined((found[at].ids for at in range(len(texts))), counts)
    if len(suspects := controls.suspects(ids, counts)):
        each: list[Any] = np.split(ids, np.cumsum(counts)[:-1])
        for at in suspects.tolist():
            each[at], placed[at] = next(controls.text_tokens([texts[at]], [places[at]]))
            counts[at] = len(each[at])
        ids = np.concatenate(each)
    return ids, counts, placed


def _joined(lists: Iterable[list[int]], counts: Array) -> Array:
    return np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=int(counts.sum()))


def target_bytes(text: str, offsets: list[tuple[int, int]]) -> Array:
    """UTF-8 bytes that each token adds to the text before it; one entry more for what follows the last token.

    A character of several tokens is counted with the first of them, and what no token covers with the next.
    """
    ends = np.maximum.accumulate([end for _, end in offsets] + [len(text)])
    if not text.isascii():
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        size_of = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(int)
        ends = np.concatenate([[0], np.cumsum(size_of)])[ends]
    return np.diff(ends, prepend=0)
