"""Pairs of prompt and answer as sequences: only the answer is learnt, and a teacher may see another prompt before it.

A sequence is as pipeline/data/sequences.py says. Where the teacher's prompts are its own, it also has, int32,

    teacher_input_ids      the teacher's prompt and the answer; of several prompts one after another
    teacher_position_ids   from 0 again with every prompt
    teacher_targets        the answer's tokens, where they are predicted, -100 elsewhere

The teacher's targets are the student's, in their order, once for every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from models.files import remove
from models.targets import IGNORED
from pipeline.data.flat import Columns, Shard, ShardWriter, end_to_end
from pipeline.data.packing import index
from pipeline.data.prepared import once
from pipeline.data.sequences import Sequences
from pipeline.data.shards import shard_folder

_AT_ONCE = 1000  # pieces that are written together


@dataclass(frozen=True)
class Pair:
    """Tokens; a prompt has its begin token, an answer what ends it. `text_bytes`: of the answer, in UTF-8."""

    prompt: list[int]
    answer: list[int]
    text_bytes: int
    teacher_prompts: list[list[int]] = field(default_factory=list)  # where they are not the student's


def split_pair(query: str, answer: str, ids: Callable[[str], list[int]]) -> tuple[list[int], list[int], bool]:
    """(prompt, answer, whether a token would have reached across both), in tokens."""
    bare = query.rstrip(" ")
    answer = query[len(bare) :] + answer
    prompt, both = ids(bare), ids(bare + answer)
    if both[: len(prompt)] == prompt and len(both) > len(prompt):
        return prompt, both[len(prompt) :], False
    # Behind a line end, which is then taken away: some tokenizers put a space before whatever comes first.
    line, behind = ids("\n"), ids("\n" + answer)
    return prompt, behind[len(line) :] if behind[: len(line)] == line else ids(answer)[1:], True


def write_sequences(
    pairs: Iterable[Pair],
    *,
    max_length: int,
    packed: bool,
    folder: Path,
    counts: dict[str, Any],
    vocabulary: int,
    draws: int = 0,
) -> tuple[Sequences, dict[str, Any]]:
    """Sequences of the pairs, memory mapped from `folder`, and their statistics: `counts`, when all pairs were read,
    and what packing counts.

    `vocabulary`: a number above every token. `draws`: how many prompts of its own a teacher sees for each pair; 0 none.
    `max_length` is of the student's sequences; a longer pair is a ValueError, as the caller decides what becomes of it.
    """
    if draws > 1 and packed:
        raise ValueError("sequences of several teacher's prompts are not packed")

    columns = Columns(vocabulary, learnt=True, teacher_vocabulary=vocabulary if draws else 0, prompted=bool(draws))

    def build(aside: Path) -> list[Shard]:
        for path in aside.iterdir():
            remove(path)
        writer = ShardWriter(shard_folder(aside, 0), columns)
        try:
            some = (_piece(pair, max_length, draws) for pair in pairs)
            while pieces := list(islice(some, _AT_ONCE)):
                writer.add(end_to_end({name: [piece[name] for piece in pieces] for name in pieces[0]}))
            writer.close({})
        except BaseException:
            writer.drop()
            raise
        made = [Shard.read(shard_folder(aside, 0))]
        index(aside, made, max_length=max_length, packing=packed, counted=counts)
        return made

    return once(folder, build)


def _piece(pair: Pair, max_length: int, draws: int) -> dict[str, Any]:
    if not pair.prompt or not pair.answer or len(pair.prompt) + len(pair.answer) > max_length:
        raise ValueError(
            f"{len(pair.prompt)} + {len(pair.answer)} tokens: need 1 or more of both, and {max_length} at most"
        )
    piece: dict[str, Any] = {
        "input_ids": pair.prompt + pair.answer,
        "targets": _targets(pair.prompt, pair.answer),
        "bytes": pair.text_bytes,
    }
    if draws:
        prompts = pair.teacher_prompts or [pair.prompt] * draws
        if len(prompts) != draws:
            raise ValueError(f"{len(prompts)} teacher's prompts, and {draws} are expected")
        piece["teacher_input_ids"] = [token for prompt in prompts for token in prompt + pair.answer]
        piece["teacher_position_ids"] = [at for prompt in prompts for at in range(len(prompt) + len(pair.answer))]
        piece["teacher_targets"] = [token for prompt in prompts for token in _targets(prompt, pair.answer)]
    return piece


def _targets(prompt: list[int], answer: list[int]) -> list[int]:
    """Of prompt + answer: the answer's tokens, each where the token before it stands."""
    return [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]


def common_prefix(sequences: Any, least: int = 16) -> list[int]:
    """The tokens with which the teacher's side of every sequence begins: its keys and values are made only once.

    The last token before an answer is left to the sequence itself. Fewer than `least` tokens are not worth it: then
    none.
    """
    if "teacher_targets" not in sequences.column_names or not len(sequences):
        return []
    shared: np.ndarray | None = None
    teachers = sequences.teacher_side()
    for number in range(len(teachers)):
        read = teachers.arrays(number)
        if (read["position_ids"][1:] == 0).any():  # several texts: nothing stands before the later ones
            return []
        prompt = read["input_ids"][: int(np.flatnonzero(read["targets"] != IGNORED)[0])]
        if shared is None:
            shared = prompt
        length = min(len(shared), len(prompt))
        differing = np.flatnonzero(shared[:length] != prompt[:length])
        shared = shared[: differing[0] if len(differing) else length]
        if len(shared) < least:
            return []
    return [] if shared is None else [int(token) for token in shared]
