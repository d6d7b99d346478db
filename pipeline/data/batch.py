"""The shape contract between data and training.

A sequence is a dict of equally long arrays or lists: input_ids, position_ids (restarting at 0 with every document),
targets (the next token of the same document, or -100: already shifted, nobody shifts again), and the numbers supervised
and bytes. A batch is sequences padded to one length. Padding is a document of its own, without targets, so no attention
mask is needed.

Sequences may also carry weights (one for each target, 0 where there is none), and what a teacher reads instead:
teacher_input_ids and teacher_position_ids, which have a length of their own; and beside them, of a teacher with a
tokenizer of its own, spans, four numbers each (see pipeline/data/packing.py), or, of one with prompts of its
own, teacher_targets (pipeline/data/pairs.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from models.targets import IGNORED


def collate(
    sequences: Sequence[dict[str, Any]], *, pad_token: int, length: int | None = None, side: str = "right"
) -> dict[str, Any]:
    """Sequences → {input_ids, position_ids, targets: Int64[B, T]}; T is `length`, or the longest sequence's.

    Of sequences that carry them also weights: Float32[B, T]; documents: Int64[B, T], -1 for padding; teacher_input_ids,
    teacher_position_ids, teacher_targets: Int64[B, Tt], Tt the longest one's; and spans: Int64[S, 5], the sequence in
    the batch before the four numbers, in the order of sequence and place.
    """
    batch = _padded(
        sequences,
        {"input_ids": pad_token, "position_ids": None, "targets": IGNORED, "weights": 0.0, "documents": -1},
        length,
        side,
    )
    if "teacher_input_ids" in sequences[0]:
        # Token 0, as every vocabulary has it, and the student's padding token may not be in the teacher's.
        fillers: dict[str, float | None] = {
            "teacher_input_ids": 0,
            "teacher_position_ids": None,
            "teacher_targets": IGNORED,
        }
        batch |= _padded(sequences, fillers, None, side)
    if "spans" in sequences[0]:
        spans = []
        for number, sequence in enumerate(sequences):
            places = torch.from_numpy(np.array(sequence["spans"], dtype=np.int64)).view(-1, 4)
            if side == "left":
                shifts = [batch[name].shape[1] - len(sequence[name]) for name in ("input_ids", "teacher_input_ids")]
                places = places + torch.tensor([shifts[0], 0, shifts[1], 0])
            spans.append(torch.cat([torch.full((len(places), 1), number), places], dim=1))
        batch["spans"] = torch.cat(spans)
    return batch


def blank(columns: Iterable[str], pad_token: int) -> dict[str, Any]:
    """A sequence of one padding token, with these of a sequence's columns; it counts for nothing."""
    made: dict[str, Any] = {"input_ids": [pad_token], "position_ids": [0], "targets": [IGNORED], "weights": [0.0]}
    made |= {"teacher_input_ids": [0], "teacher_position_ids": [0], "teacher_targets": [IGNORED], "spans": []}
    return {name: made[name] for name in columns if name in made}


def _padded(
    sequences: Sequence[dict[str, Any]], fillers: dict[str, float | None], length: int | None, side: str
) -> dict[str, Any]:
    """The columns named by `fillers` that the sequences have, as tensors; None numbers the padding from 0."""
    fillers = {name: filler for name, filler in fillers.items() if name in sequences[0]}
    width = length or max(len(each[next(iter(fillers))]) for each in sequences)
    batch = {}
    for name, filler in fillers.items():
        lines = np.full((len(sequences), width), filler or 0, dtype=np.float32 if name == "weights" else np.int64)
        for line, each in zip(lines, sequences, strict=True):
            values = np.asarray(each[name])
            missing = width - len(values)
            if filler is None:
                line[slice(missing) if side == "left" else slice(len(values), None)] = np.arange(missing)
            line[slice(missing, None) if side == "left" else slice(len(values))] = values
        batch[name] = torch.from_numpy(lines)
    return batch


def pad_token(tokenizer: Any) -> int:
    """Any token will do: nothing supervised attends to padding, and it is nobody's target."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
