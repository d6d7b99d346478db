"""What matrices read, on a grid too: by a scale of every token's own, or by one that calibration text has shown."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.straight_through import straight_through

# I what a matrix reads


@dataclass(frozen=True)
class Activations:
    """s = max |x| / (2^(bits−1) − 1), of a token where `dynamic`, else of all calibration text; q = round(x / s), in
    [−2^(bits−1), 2^(bits−1) − 1]. A token of zeros has scale 1. Halves are rounded to even."""

    bits: int = 8
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 8:
            raise Refusal(f"activations.bits={self.bits}: need 4 to 8")

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scale(self, largest: Tensor) -> Tensor:
        """Float32, of the largest magnitudes."""
        scale = largest.float() / self.highest
        return torch.where(scale == 0, 1.0, scale)

    def rounded(self, read: Tensor, scale: Tensor | None = None) -> Tensor:
        """`read` [..., I] as the grid says it, in its own dtype; to the backward it is `read` itself, where that is in
        range. `scale`: of static grids, Float32[]."""
        if scale is None:
            scale = self.scale(read.detach().abs().amax(-1, keepdim=True))
        exact = read.float()
        inside = (exact / scale).clamp(-self.highest - 1, self.highest)  # no gradient from outside the range
        return (scale * straight_through(inside, inside.round())).to(read)
