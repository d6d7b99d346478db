"""Pieces: documents, tokenized, in parts that fit into a sequence, with what is supervised in each.

A piece is a window of a text, or a conversation. A text is begin + tokens + end, and its windows overlap by
one token, so that all after begin is a target exactly once. A conversation has no windows: one that is too long is
truncated.

The teacher's piece of a text is those of its tokens of the text that lie within the student's piece; begin + these, if
the piece begins the text, and + end, if it ends it. So tokens are those of the whole text, not tokenized anew at every
window, and the teacher sees just the text that the student sees: with identical tokenizers, the very same pieces.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Refusal
from models.targets import IGNORED
from pipeline.data.alignment import Aligned, Aligner
from pipeline.data.controls import Controls, Tokens
from pipeline.data.conversations import Conversation, conversation
from pipeline.data.flat import Pieces, end_to_end
from pipeline.data.frames import controls_of
from pipeline.data.parts import Batch
from pipeline.data.rendering import teachers_template
from pipeline.data.source import DataSource
from pipeline.data.tokenizer import ends
from pipeline.data.turns import Turns, turns_of
from pipeline.data.windows import target_bytes, windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ints = NDArray[np.integer[Any]]
_Spoken = tuple[str, list[tuple[int, int]], Tokens]  # a text, where in it the assistant speaks, and its tokens
Lists = dict[str, list[Any]]  # of pieces: input_ids, targets, bytes; weights; teacher_input_ids, spans
PieceMaker = Callable[[Batch], Pieces]


class Found(Counter[str]):
    """What was counted, and the control tokens that texts spell: the student's, and perhaps the teacher's."""

    controls: Sequence[Controls] = ()


def _no_pieces(data: DataSource, teacher: Teacher | None) -> Lists:
    pieces: Lists = {"input_ids": [], "targets": [], "bytes": []}
    if data.weight_column is not None:
        pieces["weights"] = []
    if teacher:
        pieces |= {"teacher_input_ids": [], "spans": []}
    return pieces


class Teacher:
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

    def add_window(self, pieces: Lists, aligned: Aligned, at: int, length: int, ids: list[int]) -> None:
        """Beside the student's window of `length` tokens from `at` on, begin being 0; `ids` are the whole text's."""
        begin, end = ends(self.tokenizer, "the teacher's tokenizer")
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
        self, pieces: Lists, sides: tuple[_Spoken, _Spoken], contents: list[str], inside: NDArray[np.bool_]
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

    def _add(self, pieces: Lists, ids: list[int], spans: Ints) -> None:
        """`spans` as in Aligned, but in places that predict."""
        counts = spans[:, [1, 3]] - spans[:, [0, 2]]
        pieces["teacher_input_ids"].append(ids)
        pieces["spans"].append(np.stack([spans[:, 0], counts[:, 0], spans[:, 2], counts[:, 1]], axis=1).ravel())
        self.tally["teacher_tokens"] += len(ids)
        self.tally["spans"] += len(spans)
        self.tally["spanned"] += int(counts[:, 0].sum())


# Texts


def text_pieces(
    tokenizer: PreTrainedTokenizerBase, data: DataSource, tally: Found, teacher: Teacher | None
) -> PieceMaker:
    begin, end = ends(tokenizer, "the tokenizer")
    controls = controls_of(tokenizer, data)
    theirs_too = None
    if teacher:
        ends(teacher.tokenizer, "the teacher's tokenizer")
        theirs_too = controls_of(teacher.tokenizer, data)
    tally.controls = [controls] if theirs_too is None else [controls, theirs_too]

    def make(batch: Batch) -> Pieces:
        texts, weights, places = [], [], []
        for place, text, weight in zip(batch.places, batch.contents, batch.weights, strict=True):
            if not text or text.isspace():
                tally["empty"] += 1
            elif data.weight_column is not None and not np.float32(weight) > 0:
                tally["unsupervised"] += 1
            else:
                texts.append(text)
                weights.append(weight)
                places.append(place)
        if theirs_too is None:
            return windows(texts, weights, places, controls, (begin, end), data)
        pieces = _no_pieces(data, teacher)
        both = zip(controls.text_tokens(texts, places), theirs_too.text_tokens(texts, places), strict=True)
        for text, weight, (ours, theirs) in zip(texts, weights, both, strict=True):
            assert teacher is not None
            _add_text(pieces, text, weight, [begin, *ours[0], end], ours, theirs, data, teacher)
        return end_to_end(pieces)

    return make


def _add_text(
    pieces: Lists,
    text: str,
    weight: float,
    whole: list[int],
    ours: Tokens,
    theirs: Tokens,
    data: DataSource,
    teacher: Teacher,
) -> None:
    """The windows of a text that a teacher reads in tokens of its own."""
    ids, sizes = np.array(whole), target_bytes(text, ours[1])
    aligned = teacher.aligned(text, ours, theirs)
    for at in range(0, len(ids) - 1, data.max_length - 1):
        window = ids[at : at + data.max_length]
        pieces["input_ids"].append(window)
        pieces["targets"].append(np.append(window[1:], IGNORED))
        pieces["bytes"].append(sizes[at : at + data.max_length - 1].sum())
        if data.weight_column is not None:
            pieces["weights"].append(np.append(np.full(len(window) - 1, weight), 0))
        teacher.add_window(pieces, aligned, at, len(window), theirs[0])


# Conversations


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase, data: DataSource, tally: Found, teacher: Teacher | None
) -> PieceMaker:
    turns = turns_of(tokenizer, data)
    taught_turns = turns_of(teacher.tokenizer, data, teachers_template(teacher.tokenizer, data)) if teacher else None
    tally.controls = [each.controls for each in (turns, taught_turns) if each is not None]
    if not tokenizer.is_fast:
        raise Refusal("the data are conversations, which need a fast tokenizer (with a tokenizer.json)")

    def make(batch: Batch) -> Pieces:
        pieces = _no_pieces(data, teacher)
        places = batch.places
        read = [conversation(messages, where) for messages, where in zip(batch.contents, places, strict=True)]
        sides = _spoken(turns, read, places)
        taught = _spoken(taught_turns, read, places) if taught_turns else repeat(None, len(read))
        for messages, where, weight, side, theirs in zip(read, places, batch.weights, sides, taught, strict=True):
            text, spans, (tokens, offsets) = side
            ids = np.array(tokens)
            # Inside are the starts before which an odd number of spans' ends lie: [from, to, from, to, ...]
            passed = np.searchsorted(np.ravel(spans), [start for start, _ in offsets], side="right")
            each = np.append(_turn_weights(messages, len(spans), weight, data, where), 0)
            weights = np.where(passed % 2 == 1, each[passed // 2], 0).astype(np.float32)
            inside = weights > 0
            sizes = np.where(np.isin(ids, tokenizer.all_special_ids), 0, target_bytes(text, offsets)[:-1])
            tally["truncated"] += len(ids) > data.max_length
            tally["cut_to_nothing"] += bool(inside[1:].any() and not inside[1 : data.max_length].any())
            ids, inside, sizes = ids[: data.max_length], inside[: data.max_length], sizes[: data.max_length]
            if not inside[1:].any():
                tally["unsupervised"] += 1
                continue
            pieces["input_ids"].append(ids)
            pieces["targets"].append(np.append(np.where(inside[1:], ids[1:], IGNORED), IGNORED))
            pieces["bytes"].append(sizes[1:][inside[1:]].sum())
            if data.weight_column is not None:
                pieces["weights"].append(np.append(weights[1 : len(ids)], np.float32(0)))
            if teacher and theirs:
                contents = [message["content"] for message in messages if message["role"] == "assistant"]
                _check_parts(len(side[1]), len(contents), "the chat template", where)
                _check_parts(len(theirs[1]), len(contents), "the teacher's chat template", where)
                teacher.add_conversation(pieces, (side, theirs), contents, inside)
        return end_to_end(pieces)

    return make


def _spoken(turns: Turns, read: list[Conversation], places: list[str]) -> Iterator[_Spoken]:
    """Each conversation as text, where in it the assistant speaks, and its tokens."""
    texts = [turns.rendered(*given) for given in zip(read, places, strict=True)]
    found = turns.tokens([text for text, _ in texts], places)
    for (text, spans), tokens in zip(texts, found, strict=True):
        yield turns.controls.unquoted(text), spans, tokens


def _check_parts(parts: int, turns: int, whose: str, where: str) -> None:
    if parts != turns:
        raise Refusal(
            f"{where}: {whose} marks {parts} parts where the assistant speaks {turns} times, so its turns are not "
            "known; give a data.chat_template with one {% generation %} mark around each"
        )


def _turn_weights(messages: Conversation, parts: int, weight: float, data: DataSource, where: str) -> list[float]:
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
