"""Units that say little: the size of what they give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.pruning.groups import Anatomy, Axis, Group
from models.pruning.importance import over_inputs, wanted


@dataclass(frozen=True)
class Activation:
    """The mean over tokens of the Euclidean length of what a unit gives the next matrix: of a head its output, of a
    channel its size. Minitron, arXiv:2407.14679."""

    needs_calibration_data: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("heads", "mlp")

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        groups = wanted(anatomy, kinds)
        total = {group.name: np.zeros(group.units) for group in groups}
        tokens = dict.fromkeys(total, 0)

        def take(group: Group, axis: Axis, read_NI: Tensor) -> None:
            places = torch.from_numpy(axis.places).to(read_NI.device)
            total[group.name] += read_NI[:, places].double().norm(dim=-1).sum(0).cpu().numpy()
            tokens[group.name] += len(read_NI)

        over_inputs(model, groups, batches, take)
        return {name: values / max(1, tokens[name]) for name, values in total.items()}
