"""How much a head attends to other tokens than a text's first: a head that attends to that one alone does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from models.errors import Refusal
from models.pruning.groups import Anatomy
from models.pruning.importance import Batch, Statistics, run, tokens_of


@dataclass(frozen=True)
class AttentionMass:
    """The mean over tokens of the attention that a unit's query heads give to all but the first token of their text.

    The attention of a token sums to 1 in every head, so the sum alone tells no head from another; attention that a head
    has no use for stays on the first token (attention sinks, arXiv:2309.17453). It needs attention weights:
    during the measurement the model computes attention eagerly.
    """

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    @torch.no_grad()
    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        before = model.config._attn_implementation
        model.set_attn_implementation("eager")
        try:
            attentions = run(model, batch, [], output_attentions=True).attentions
        finally:
            model.set_attn_implementation(before)
        if not attentions or attentions[0] is None:
            raise Refusal(
                f"importance: {type(model).__name__} does not return its attention weights; choose another importance"
            )
        real_BT = batch["targets"] >= 0
        elsewhere_BS = (batch["position_ids"] != 0).double()
        made = {"tokens": tokens_of(batch)}
        for layer, weights_BHTS in enumerate(attentions):
            mass_BHT = torch.einsum("bhts,bs->bht", weights_BHTS.double(), elsewhere_BS)
            mass_H = (mass_BHT * real_BT[:, None]).sum((0, 2)).cpu().numpy()
            made[f"layers.{layer}.heads"] = mass_H.reshape(anatomy.kv_heads, -1).sum(1)
        return made

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        tokens = max(1.0, float(statistics["tokens"][0]))
        return {group.name: statistics[group.name] / tokens for group in anatomy.of("heads")}
