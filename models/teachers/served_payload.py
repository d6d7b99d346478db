"""A server's best tokens as the payload of a top-k encoding: distinct tokens, each with its share of the vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from models.errors import Refusal
from models.teachers.encodings.encoding import Payload
from models.teachers.encodings.top_k import DTYPES, FLOOR, TopK, ids_dtype


def served_payload(encoding: TopK, ids_NK: Any, log_NK: Any, vocabulary: int, columns: int, path: str) -> Payload:
    """`columns`: of the model's table, which can be padded beyond its tokenizer's `vocabulary`; `path`: of the teacher,
    for messages. Raises Refusal where the server has another model, or gives fewer tokens than the encoding keeps."""
    if ids_NK.size and ids_NK.max() >= columns:
        raise Refusal(
            f"teacher.path={path}: the server names token {ids_NK.max()}, and its model has {columns}; give the "
            f"tokenizer and the config of the model that is served"
        )
    width = min(encoding.k, vocabulary)
    if ids_NK.shape[1] < width:
        raise Refusal(
            f"teacher.endpoint.top_k={encoding.k}: the server gives {ids_NK.shape[1]} tokens at most; set "
            f"teacher.endpoint.top_k={ids_NK.shape[1]}"
        )
    ids_NK, log_NK = _distinct(ids_NK, log_NK.astype(np.float64), width, vocabulary)
    payload = {
        "ids": torch.from_numpy(ids_NK).to(ids_dtype(vocabulary)),
        "logits": torch.from_numpy(log_NK).to(DTYPES[encoding.dtype]),
    }
    if ids_NK.shape[1] < vocabulary:
        rest_N = (1 - np.exp(log_NK).sum(-1)).clip(1e-9)  # rounding can leave less than nothing
        payload["tails"] = torch.from_numpy(np.log(rest_N)).float()[:, None]
    return payload


def _distinct(ids_NK: Any, log_NK: Any, width: int, vocabulary: int) -> tuple[Any, Any]:
    """`width` different tokens at every position, where a server named columns that are no tokens, or left a place
    empty.

    The same id twice would double its probability. A place is empty (-1) where no other token is possible; where a
    padding column was removed, another token takes its place with the average of the remaining probability.
    """
    token_NK = (ids_NK >= 0) & (ids_NK < vocabulary)
    beyond_N = np.where(ids_NK >= vocabulary, np.exp(log_NK), 0).sum(-1, keepdims=True)
    log_NK = np.where(token_NK, (log_NK - np.log1p(-beyond_N)).clip(FLOOR), FLOOR)
    order = np.argsort(~token_NK, axis=-1, kind="stable")[:, :width]
    impossible_N = (ids_NK < 0).any(-1)
    ids_NK, log_NK, token_NK = (np.take_along_axis(each, order, -1) for each in (ids_NK, log_NK, token_NK))
    for at in np.flatnonzero(~token_NK.all(-1)):
        known, empty = token_NK[at], ~token_NK[at]
        free = np.setdiff1d(np.arange(min(vocabulary, 2 * width)), ids_NK[at, known])
        ids_NK[at, empty] = free[: empty.sum()]
        if not impossible_N[at]:
            left = 1 - np.exp(log_NK[at, known]).sum()
            log_NK[at, empty] = np.log(max(left, 1e-9) / (vocabulary - known.sum()))
    return ids_NK, log_NK
