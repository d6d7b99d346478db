"""The size of a unit's activations: units whose activations are small matter little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import Batch, Statistics, over_inputs, real, run, tokens_of, wanted


@dataclass(frozen=True)
class Activation:
    """The mean over tokens of the Euclidean length of a unit's activations: of a head its output, of a channel its
    absolute value; of a channel of the residual stream the sum over the outputs of all norms. Minitron,
    arXiv:2407.14679."""

    needs_calibration_data: ClassVar[bool] = True
    sees_experts: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp", "hidden")

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        made = {"tokens": tokens_of(batch)}

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            places = torch.from_numpy(axis.places).to(read_NI.device)
            made[group.name] = read_NI[:, places].norm(dim=-1).sum(0).cpu().numpy()

        over_inputs(model, wanted(anatomy, [kind for kind in kinds if kind != "hidden"]), batch, take)
        if "hidden" in kinds:
            self._stream(model, anatomy, batch, made)
        return made

    def _stream(self, model: Any, anatomy: Anatomy, batch: Batch, made: Statistics) -> None:
        def take(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            sizes = real(output, batch).double().abs().sum(0).cpu().numpy()
            made["hidden"] = made["hidden"] + sizes if "hidden" in made else sizes

        norms = {name.rpartition(".")[0] for name in anatomy.norms}
        run(model, batch, [partial(model.get_submodule(name).register_forward_hook, take) for name in sorted(norms)])

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        tokens = max(1.0, float(statistics["tokens"][0]))
        return {group.name: statistics[group.name] / tokens for group in wanted(anatomy, kinds)}
