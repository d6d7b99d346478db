"""Text for methods that go through a model layer by layer: rows of one length, without padding."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from pipeline.context import Context
from pipeline.data.rows import RowSource, rows_of

_AT_ONCE = 8  # rows in a batch


def check(config: Any, tokens: int, stage: str) -> None:
    """Refuse rows that are longer than the model reads."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and limit < tokens:
        raise Refusal(
            f"{stage}.calibration_tokens={tokens}: the model reads at most {limit} tokens (max_position_embeddings)"
        )


def batches(
    context: Context, data: RowSource, tokenizer: Any, size: tuple[int, int], seed: int, stage: str
) -> list[Tensor]:
    """Int64[B, T] each, rows × tokens in all: training documents in an order drawn by the seed, laid end to end."""
    rows, _, _ = rows_of(data, "train", tokenizer, context.data_folder)
    count, length = size
    tokens: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(rows)):
        tokens += rows[int(number)]["input_ids"]
        if len(tokens) >= count * length:
            break
    if len(tokens) < count * length:
        raise Refusal(
            f"{stage}.calibration_rows={count} of calibration_tokens={length}: need {count * length:,} tokens, and "
            f"data.train has {len(tokens):,}; take fewer or shorter rows, or more text"
        )
    ids = torch.tensor(tokens[: count * length], device=context.device)
    return list(ids.view(count, length).split(_AT_ONCE))
