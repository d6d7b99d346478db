"""The shape contract between data and training.

A row is a dict of equally long lists: input_ids, position_ids (restarting at 0 with every document), targets (the next
token of the same document, or -100: already shifted, nobody shifts again), and the numbers supervised and bytes. A
batch is rows padded to one length. Padding is a document of its own, without targets, so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

IGNORED = -100


def collate(
    rows: Sequence[dict[str, Any]], *, pad_token: int, length: int | None = None, side: str = "right"
) -> dict[str, Any]:
    """Rows → {input_ids, position_ids, targets: Int64[B, T]}; T is `length`, or the longest row's."""
    width = length or max(len(row["input_ids"]) for row in rows)
    batch = {}
    for name, filler in (("input_ids", pad_token), ("position_ids", None), ("targets", IGNORED)):
        lines = []
        for row in rows:
            missing = width - len(row[name])
            padding = list(range(missing)) if filler is None else [filler] * missing
            lines.append(padding + list(row[name]) if side == "left" else list(row[name]) + padding)
        batch[name] = torch.tensor(lines, dtype=torch.long)
    return batch


def pad_token(tokenizer: Any) -> int:
    """Any token will do: nothing supervised attends to padding, and it is nobody's target."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)
