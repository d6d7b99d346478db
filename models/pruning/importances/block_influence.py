"""How much a layer changes its input: a layer that changes it little matters little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.pruning.groups import Anatomy
from models.pruning.importance import Batch, Statistics, real, run, tokens_of
from models.representations import decoder_layers


@dataclass(frozen=True)
class BlockInfluence:
    """1 − the mean over tokens of the cosine between a layer's input and output. ShortGPT, arXiv:2403.03853."""

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("layers",)

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        turned = np.zeros(anatomy.layers)

        def hook(number: int) -> Any:
            def take(module: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
                after = output[0] if isinstance(output, tuple) else output
                one, other = real(inputs[0], batch).double(), real(after, batch).double()
                turned[number] = float((1 - torch.nn.functional.cosine_similarity(one, other, dim=-1)).sum())

            return take

        layers = enumerate(decoder_layers(model))
        run(model, batch, [partial(layer.register_forward_hook, hook(number)) for number, layer in layers])
        return {"layers": turned, "tokens": tokens_of(batch)}

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        return {"layers": statistics["layers"] / max(1.0, float(statistics["tokens"][0]))}
