"""Layers that change little of what passes through them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.pruning.groups import Anatomy
from models.representations import decoder_layers


@dataclass(frozen=True)
class BlockInfluence:
    """1 − the mean over tokens of the cosine between a layer's input and output. ShortGPT, arXiv:2403.03853."""

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)

    @torch.no_grad()
    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        total, tokens = np.zeros(anatomy.layers), 0
        real: list[Tensor] = []

        def hook(number: int) -> Any:
            def take(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
                after = output[0] if isinstance(output, tuple) else output
                cosines = torch.nn.functional.cosine_similarity(inputs[0].double(), after.double(), dim=-1)
                total[number] += float((1 - cosines)[real[0]].sum())

            return take

        layers = decoder_layers(model)
        handles = [layer.register_forward_hook(hook(number)) for number, layer in enumerate(layers)]
        training = model.training
        model.eval()
        try:
            for batch in batches:
                real[:] = [batch["targets"] >= 0]
                tokens += int(real[0].sum())
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
            model.train(training)
        return {"layers": total / max(1, tokens)}
