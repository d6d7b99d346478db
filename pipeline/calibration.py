"""What stages share that change a finished model by a little text: how the model is found, and rows of one length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.load import check_folder, load_config
from pipeline.context import Context
from pipeline.data.rows import RowSource, rows_of

_AT_ONCE = 8  # rows in a batch


def config_of(context: Context, model: str, trust_remote_code: bool) -> Any:
    """In the check: the config of a model that is there, weights and all, or that a stage before will make."""
    if not context.produced_by(model):
        check_folder(model, "model")
    elif context.config_folder(model) == model and not context.finished(model):
        raise Refusal(
            f"{context.stage} needs the stage {Path(model).name}, which has not been run; add it to stages, or give "
            f"stages.{context.stage}.model=FOLDER"
        )
    config = load_config(context.config_folder(model), "model", trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise Refusal(f"stages.{context.stage}.model={model}: its weights are packed; give the model it was made of")
    return config


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
