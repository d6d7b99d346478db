"""Pairs of prompt and answer as sequences: only the answer is learnt, and a teacher may see another prompt before it.

A sequence is as pipeline/data/packing.py says. Where the teacher's prompts are its own, it also has, int32,

    teacher_input_ids      the teacher's prompt and the answer; of several prompts one after another
    teacher_position_ids   from 0 again with every prompt
    teacher_targets        the answer's tokens, where they are predicted, -100 elsewhere

The teacher's targets are the student's, in their order, once for every prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models.targets import IGNORED
from pipeline.data import packing
from pipeline.data.prepared import once

if TYPE_CHECKING:
    from datasets import Dataset


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
    draws: int = 0,
) -> tuple[Dataset, dict[str, Any]]:
    """Sequences of the pairs, memory mapped from `folder`, and their statistics: `counts`, when all pairs were read,
    and what packing counts.

    `draws`: how many prompts of its own a teacher sees for each pair; 0 none. `max_length` is of the student's
    sequences; a longer pair is a ValueError, as the caller decides what becomes of it.
    """
    if draws > 1 and packed:
        raise ValueError("sequences of several teacher's prompts are not packed")

    def build(aside: Path) -> None:
        from datasets import Dataset
        from datasets.arrow_writer import ArrowWriter

        taught = ["teacher_input_ids", "teacher_position_ids", "teacher_targets"] if draws else []
        features = packing.features_of("input_ids", "targets", *taught, "supervised", "bytes")
        path = aside / "pieces.arrow"
        written = 0
        with ArrowWriter(features=features, path=str(path)) as writer:
            for pair in pairs:
                writer.write(_piece(pair, max_length, draws))
                written += 1
            writer.finalize()
        pieces = Dataset.from_file(str(path)) if written else Dataset.from_dict({n: [] for n in features}, features)
        with packing.progress(shown=written > 100_000):
            packing.write_sequences(pieces, aside, max_length=max_length, packing=packed, counted=counts)

    return once(folder, build)


def _piece(pair: Pair, max_length: int, draws: int) -> dict[str, Any]:
    if not pair.prompt or not pair.answer or len(pair.prompt) + len(pair.answer) > max_length:
        raise ValueError(
            f"{len(pair.prompt)} + {len(pair.answer)} tokens: need 1 or more of both, and {max_length} at most"
        )
    piece: dict[str, Any] = {
        "input_ids": pair.prompt + pair.answer,
        "targets": _targets(pair.prompt, pair.answer),
        "supervised": len(pair.answer),
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


def teacher_side(sequences: Dataset) -> Dataset:
    """Sequences as the teacher reads them: where its prompts are its own, their columns under the usual names."""
    if "teacher_targets" not in sequences.column_names:
        return sequences
    names = ("input_ids", "position_ids", "targets")
    others = [name for name in sequences.column_names if not name.startswith("teacher_")]
    return sequences.remove_columns(others).rename_columns({f"teacher_{name}": name for name in names})


def common_prefix(sequences: Any, least: int = 16) -> list[int]:
    """The tokens with which the teacher's side of every sequence begins: its keys and values are made only once.

    The last token before an answer is left to the sequence itself. Fewer than `least` tokens are not worth it: then
    none.
    """
    if "teacher_targets" not in sequences.column_names or not len(sequences):
        return []
    table = sequences.with_format("arrow")
    shared: np.ndarray | None = None
    for first in range(0, len(sequences), 4096):
        part = table[first : first + 4096]
        ids = part["teacher_input_ids"].combine_chunks()
        offsets = np.concatenate([[0], np.cumsum(ids.value_lengths().to_numpy())])
        flat = ids.flatten().to_numpy()
        targets = part["teacher_targets"].combine_chunks().flatten().to_numpy()
        positions = part["teacher_position_ids"].combine_chunks().flatten().to_numpy()
        for begin, end in pairwise(offsets):
            if (positions[begin + 1 : end] == 0).any():  # several texts: nothing stands before the later ones
                return []
            asked = int(np.flatnonzero(targets[begin:end] != IGNORED)[0])
            prompt = flat[begin : begin + asked]
            if shared is None:
                shared = prompt
            length = min(len(shared), len(prompt))
            differing = np.flatnonzero(shared[:length] != prompt[:length])
            shared = shared[: differing[0] if len(differing) else length]
            if len(shared) < least:
                return []
    return [] if shared is None else [int(token) for token in shared]
