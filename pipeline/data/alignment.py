"""Two tokenizers over one text: which of their tokens stand for the same bytes.

Places in a text are counted in half bytes: byte p of its UTF-8 is 2p. The odd number before it, 2p - 1, is where the
space begins that SentencePiece puts in front of a text although the text has none. So such a space is never taken for
a real one, and two tokens are at the same place only if they are to the byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.token_bytes import special_ids, token_bytes
from pipeline.data.tokenizer import first_difference

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 16  # tokens of one side in a span; longer ones hold little about the other side's single tokens

Ints = NDArray[np.integer[Any]]
Tokens = tuple[Sequence[int], Sequence[tuple[int, int]]]  # ids, and where each stands in the text, in characters
Range = tuple[int, int]


@dataclass(frozen=True)
class Places:
    """Where N tokens stand in a text, in half bytes (see the module).

    To the byte where `spelled`: there the text reads as the token says, right behind the spelled token before it or
    after a gap. Elsewhere (special tokens, what a normalizer changed) as far as the tokenizer's offsets go.
    """

    starts: Ints  # [N]
    ends: Ints  # [N]
    spelled: NDArray[np.bool_]  # [N]


@dataclass(frozen=True)
class Aligned:
    """Two tokenizations of one text. A span is (s0, s1, t0, t1): student's tokens [s0, s1), teacher's [t0, t1)."""

    student: Places
    teacher: Places
    spans: Ints  # [K, 4], ascending
    dropped: int  # spans of more than LONGEST tokens of a side, which are not in `spans`

    def window(self, begin: int, end: int) -> tuple[Range, Ints]:
        """The teacher's tokens in the text of the student's [begin, end), and the spans that can be predicted in it.

        `begin` -1 is the begin token, `end` beyond the tokens the end of the text. A token of the teacher that reaches
        out of the window is not in it; the student's token `begin` is, but nothing before it predicts it.
        """
        starts, ends = self._teachers
        after, until = (np.searchsorted(self.spans[:, i], bound, side="right") for i, bound in ((0, begin), (1, end)))
        # Where a span begins or ends is a boundary of both sides for certain; places known by offsets alone may not be.
        first, last = 0, len(starts)
        if begin >= 0 and after and self.spans[after - 1, 0] == begin:
            first = int(self.spans[after - 1, 2])
        elif begin >= 0:
            first = int(np.searchsorted(starts, self.student.starts[begin]))
        if until and self.spans[until - 1, 1] == end:
            last = int(self.spans[until - 1, 3])
        elif end <= len(self.student.ends):
            last = int(np.searchsorted(ends, self.student.ends[end - 1], side="right"))
        spans = self.spans[after : max(after, until)]
        return (first, max(first, last)), spans[(spans[:, 2] >= first) & (spans[:, 3] <= last)]

    @cached_property
    def _teachers(self) -> tuple[Ints, Ints]:
        """Starts and ends of the teacher's tokens, in order also where offsets are not."""
        return np.maximum.accumulate(self.teacher.starts), np.maximum.accumulate(self.teacher.ends)


class Aligner:
    """Aligns texts and conversations that a student's and a teacher's tokenizer have tokenized."""

    def __init__(self, student_tokenizer: PreTrainedTokenizerBase, teacher_tokenizer: PreTrainedTokenizerBase) -> None:
        self.student_words, self.teacher_words = token_bytes(student_tokenizer), token_bytes(teacher_tokenizer)
        self.student_special, self.teacher_special = special_ids(student_tokenizer), special_ids(teacher_tokenizer)
        self.same = first_difference(teacher_tokenizer, student_tokenizer) is None

    def text(self, text: str, student: Tokens, teacher: Tokens) -> Aligned:
        """The spans of a text, between any two consecutive boundaries of tokens that both sides have."""
        ours, theirs = places(text, student, self.student_words), places(text, teacher, self.teacher_words)
        return Aligned(ours, theirs, *self._spans(student, teacher, ours, theirs))

    def conversation(
        self,
        student: tuple[str, Sequence[Range], Tokens],
        teacher: tuple[str, Sequence[Range], Tokens],
        contents: Sequence[str],
    ) -> tuple[Ints, int]:
        """(spans as in `Aligned`, spans dropped) of one conversation that each side has rendered in its own way.

        A side is its text, the ranges of characters where the assistant speaks, and its tokens; `contents` is what
        the assistant says in each range. Only that is aligned, turn by turn, with the token that ends the turn:
        the one special token that follows the content on each side.
        """
        ours, theirs = (
            places(student[0], student[2], self.student_words),
            places(teacher[0], teacher[2], self.teacher_words),
        )
        ids = list(student[2][0])
        if self.same and ids == list(teacher[2][0]):
            return self._spans(student[2], teacher[2], ours, theirs)
        at_ours, at_theirs = _half_bytes(student[0]), _half_bytes(teacher[0])
        kept = np.zeros(len(ours.starts), dtype=bool)
        moved, taken = theirs.starts.copy(), np.zeros(len(theirs.starts), dtype=bool)
        ended, ends = theirs.ends.copy(), []
        for content, our_turn, their_turn in zip(contents, student[1], teacher[1], strict=True):
            found = _found(content, student[0], our_turn, teacher[0], their_turn)
            if found is None:
                continue
            our_begin, their_begin, length = found
            our_bytes = at_ours[[our_begin, our_begin + length, our_turn[1]]]
            their_bytes = at_theirs[[their_begin, their_begin + length, their_turn[1]]]
            # From one half byte before the content: a space that both tokenizers put in front of it is the same.
            kept |= (ours.starts >= our_bytes[0] - 1) & (ours.ends <= our_bytes[1])
            inside = (theirs.starts >= their_bytes[0] - 1) & (theirs.ends <= their_bytes[1])
            taken |= inside
            moved[inside] += our_bytes[0] - their_bytes[0]
            ended[inside] += our_bytes[0] - their_bytes[0]
            our_end = _special_in(ours, ids, self.student_special, our_bytes[1:])
            their_end = _special_in(theirs, teacher[2][0], self.teacher_special, their_bytes[1:])
            if len(our_end) == len(their_end) == 1:
                ends.append((our_end[0], our_end[0] + 1, their_end[0], their_end[0] + 1))
        ours = replace(ours, spelled=ours.spelled & kept)
        theirs = Places(moved, ended, theirs.spelled & taken)
        spans, dropped = spans_between(ours, theirs)
        both = np.concatenate([spans, np.array(ends, dtype=np.int64).reshape(-1, 4)])
        return both[np.argsort(both[:, 0], kind="stable")], dropped

    def _spans(self, student: Tokens, teacher: Tokens, ours: Places, theirs: Places) -> tuple[Ints, int]:
        if self.same and list(student[0]) == list(teacher[0]):
            # Also where the bytes are not known: the same token stands for the same.
            number = np.arange(len(student[0]))
            return np.stack([number, number + 1, number, number + 1], axis=1), 0
        return spans_between(ours, theirs)


def places(text: str, tokens: Tokens, words: Sequence[bytes | None]) -> Places:
    """Where the tokens of a text stand, to the byte where its bytes are those of `words` (see token_bytes).

    Offsets alone would not do: they are characters, of which byte tokens share one, some tokenizers leave spaces out
    of them, and a normalizer may have put other letters in.
    """
    ids, offsets = tokens
    raw, at = text.encode(), _half_bytes(text)
    characters = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    starts, ends = at[characters[:, 0]], at[characters[:, 1]]
    spelled = np.zeros(len(ids), dtype=bool)
    spellings = [words[id_] if id_ < len(words) else None for id_ in ids]
    # Sections between tokens that stand for no bytes: what such a one leaves for the others is known by its offsets,
    # and SentencePiece puts its space in front of each section.
    begin, here = 0, 0
    for stop in [*(i for i, word in enumerate(spellings) if word is None), len(ids)]:
        until = len(raw) if stop == len(ids) else max(here, int(starts[stop]) // 2)
        section = [word for word in spellings[begin:stop] if word is not None]
        together, part = b"".join(section), raw[here:until]
        if section and together in (part, b" " + part):
            edges = 2 * (here + np.cumsum([0, *map(len, section)]))
            if together != part:
                edges -= 2
                edges[0] += 1
            starts[begin:stop], ends[begin:stop], spelled[begin:stop] = edges[:-1], edges[1:], True
        elif section:
            firsts, lasts = (starts[begin:stop] // 2).tolist(), (ends[begin:stop] // 2).tolist()
            found = _searched(raw, here, section, firsts, lasts)
            if section[0][:1] == b" ":
                unspaced = _searched(raw, here, [section[0][1:], *section[1:]], firsts, lasts)
                if sum(edge is not None for edge in unspaced) > sum(edge is not None for edge in found):
                    found = [edge and (edge[0] - (i == 0), edge[1]) for i, edge in enumerate(unspaced)]
            for i, edge in enumerate(found, start=begin):
                if edge is not None:
                    (starts[i], ends[i]), spelled[i] = edge, True
        if stop < len(ids):
            here = max(here, int(ends[stop]) // 2)
        begin = stop + 1
    return Places(starts, ends, spelled)


def spans_between(student: Places, teacher: Places) -> tuple[Ints, int]:
    """(spans as in `Aligned`, spans dropped for their length) of tokens whose places are those of one text."""
    ours, theirs = np.flatnonzero(student.spelled), np.flatnonzero(teacher.spelled)
    starts, s0, t0 = np.intersect1d(student.starts[ours], teacher.starts[theirs], return_indices=True)
    ends, s1, t1 = np.intersect1d(student.ends[ours], teacher.ends[theirs], return_indices=True)
    following = np.searchsorted(ends, starts, side="right")
    s0, t0, following = (column[following < len(ends)] for column in (s0, t0, following))
    s0, t0, s1, t1 = ours[s0], theirs[t0], ours[s1[following]], theirs[t1[following]]
    # A gap on one side lies between them: the boundary at its other end belongs to another span.
    whole = np.ones(len(s0), dtype=bool)
    for side, first, last in ((student, s0, s1), (teacher, t0, t1)):
        follows = side.spelled[1:] & side.spelled[:-1] & (side.starts[1:] == side.ends[:-1])
        run = np.concatenate([[0], np.cumsum(~follows)])
        whole &= run[first] == run[last]
    spans = np.stack([s0, s1 + 1, t0, t1 + 1], axis=1)[whole]
    short = np.maximum(spans[:, 1] - spans[:, 0], spans[:, 3] - spans[:, 2]) <= LONGEST
    return spans[short], int((~short).sum())


def _searched(
    raw: bytes, here: int, section: list[bytes], firsts: list[int], lasts: list[int]
) -> list[tuple[int, int] | None]:
    """Where each word stands in the text, in half bytes, if it does: behind the one before it, or where its offsets
    say, with the spaces that they may have left out."""
    found: list[tuple[int, int] | None] = []
    behind = True  # the word before was found, so the next begins right at `here`
    for word, first, last in zip(section, firsts, lasts, strict=True):
        low, high = first - (len(word) - len(word.lstrip())), last + len(word) - len(word.rstrip())
        places = [here, first, low] if behind else [first, low]
        fitting = (p for p in places if p >= max(here, low) and p + len(word) <= high and raw.startswith(word, p))
        place = next(fitting, None)
        behind = place is not None
        if place is not None:
            here = place + len(word)
        found.append(None if place is None else (2 * place, 2 * here))
    return found


def _half_bytes(text: str) -> Ints:
    """[len(text) + 1]: the place of every character, and of the end."""
    if text.isascii():
        return 2 * np.arange(len(text) + 1)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF).astype(int)
    return 2 * np.concatenate([[0], np.cumsum(sizes)])


def _found(content: str, ours: str, our_turn: Range, theirs: str, their_turn: Range) -> tuple[int, int, int] | None:
    """Where both turns hold the content, and its length; templates may trim the spaces around it."""
    for needle in (content, content.strip()):
        places = ours.find(needle, *our_turn), theirs.find(needle, *their_turn)
        if min(places) >= 0:
            return *places, len(needle)
    return None


def _special_in(side: Places, ids: Sequence[int], special: set[int], bounds: Ints) -> list[int]:
    inside = np.flatnonzero((side.starts >= bounds[0]) & (side.ends <= bounds[1]))
    return [i for i in inside.tolist() if ids[i] in special]
