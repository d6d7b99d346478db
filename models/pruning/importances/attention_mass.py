"""Heads that look at nothing: how much attention goes elsewhere than to a text's first token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.pruning.groups import Anatomy


@dataclass(frozen=True)
class AttentionMass:
    """The mean over tokens of the attention that a unit's query heads give to all but the first token of their text.

    All attention of a token sums to 1 in every head, so its sum alone tells no head from another; what a head has no
    use for it leaves with the first token (attention sinks, arXiv:2309.17453). Needs attention that says its weights:
    for the time of the measurement the model computes it eagerly.
    """

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads",)

    @torch.no_grad()
    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        total, tokens = np.zeros((anatomy.layers, anatomy.heads)), 0
        before, training = model.config._attn_implementation, model.training
        model.set_attn_implementation("eager")
        model.eval()
        try:
            for batch in batches:
                words = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
                attentions = model(**words, output_attentions=True).attentions
                if not attentions or attentions[0] is None:
                    raise Refusal(f"importance: {type(model).__name__} does not say what its heads attend to")
                real_BT = batch["targets"] >= 0
                elsewhere_BS = (batch["position_ids"] != 0).double()
                for layer, weights_BHTS in enumerate(attentions):
                    mass_BHT = torch.einsum("bhts,bs->bht", weights_BHTS.double(), elsewhere_BS)
                    total[layer] += (mass_BHT * real_BT[:, None]).sum((0, 2)).cpu().numpy()
                tokens += int(real_BT.sum())
        finally:
            model.set_attn_implementation(before)
            model.train(training)
        of_units = total.reshape(anatomy.layers, anatomy.kv_heads, -1).sum(2) / max(1, tokens)
        return {f"layers.{layer}.heads": of_units[layer] for layer in range(anatomy.layers)}
