"""The proof of a pruned model: it computes what the whole model does whose removed units are silenced."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from models.errors import Refusal
from models.pruning.groups import Anatomy
from models.pruning.importance import Batch
from models.pruning.surgery import Kept, silence, silent_experts


@torch.no_grad()
def masked_equals_pruned(
    model: Any, pruned: Any, anatomy: Anatomy, kept: Kept, batches: Iterable[Batch], whose: str, tolerance: float
) -> dict[str, float | int]:
    """The certificate: the largest difference between the logits of both models on `batches`. `model` becomes masked.

    Raises Refusal where it is more than `tolerance` as a share of the largest logit. `whose`: for the message, who
    prunes.
    """
    silence(model, anatomy, kept)
    model.eval(), pruned.eval()
    apart, largest, tokens = 0.0, 0.0, 0
    for batch in batches:
        words = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        with silent_experts(model, anatomy, kept):
            masked = model(**words).logits.float()
        real = batch["targets"] >= 0
        apart = max(apart, float((masked - pruned(**words).logits.float())[real].abs().max()))
        largest, tokens = max(largest, float(masked[real].abs().max())), tokens + int(real.sum())
    allowed = tolerance * max(largest, 1e-9)
    if not apart <= allowed:
        raise Refusal(
            f"{whose}: the pruned model's logits differ by {apart:.1e} from the masked one's, and {allowed:.1e} is "
            f"allowed (prune.tolerance={tolerance:g} of the largest); nothing was written. A low dtype needs "
            f"a larger tolerance; in float32 this family is not understood"
        )
    return {"max_difference": apart, "largest_logit": largest, "tolerance": allowed, "tokens": tokens}
