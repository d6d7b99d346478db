"""Reverse KL: the student is asked only about what it says itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.objectives.divergence import Divergence, only_where


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """T² · KL(q ‖ p), student against teacher: mode-seeking. MiniLLM, arXiv:2306.08543, on given text."""

    name: ClassVar[str] = "reverse_kl"

    def of(
        self, p_NV: Float[Tensor, "N V"], q_NV: Float[Tensor, "N V"], ratio_NV: Float[Tensor, "N V"]
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, "N V"]]:
        ratio_NV = only_where(q_NV, ratio_NV)
        return torch.linalg.vecdot(q_NV, ratio_NV), q_NV * ratio_NV
