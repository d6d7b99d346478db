"""SparseGPT: weights become zero one column after another, and the columns behind correct the error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.hessian import Hessian, inverse_factor
from models.sparsity.method import Pattern, at_least_float, same_share, smallest


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgeon with one order of columns for all rows (arXiv:2301.00774).

    A weight w of column j costs w² / U_jj², U being the upper Cholesky factor of the inverse Hessian, whose square is
    the inverse Hessian's own entry once the columns before j are settled. The zeros are chosen for `block` columns and
    all rows at once, or for N:M in each group of each row when its turn comes; the columns behind are corrected.
    Weights of inputs that are always zero cost nothing and become zero first. Raises Refusal where the Hessian cannot
    be inverted.
    """

    damping: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 128
    reading: ClassVar[type[Hessian]] = Hessian

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise Refusal(f"sparsity.damping={self.damping}: need a number above 0; 0.01 is usual")
        if self.block < 1:
            raise Refusal(f"sparsity.block={self.block}: need at least 1; 128 is usual")

    def zeros(self, weights: Sequence[Tensor], fraction: float) -> list[int]:
        return same_share(weights, fraction)

    def sparsified(self, weight_OI: Tensor, zeros: int | Pattern, read: Any) -> Tensor:
        w_OI = at_least_float(weight_OI).clone()
        u_II, dead_I = inverse_factor(read.mean_II.to(w_OI), self.damping, "sparsity.damping")
        cost_I = torch.where(dead_I, 0.0, u_II.diagonal().square().reciprocal())
        width = w_OI.shape[1]
        block = self.block
        if isinstance(zeros, Pattern):
            block = max(zeros.of, block // zeros.of * zeros.of)  # no group is cut in two
        done = 0
        for begin in range(0, width, block):
            end = min(begin + block, width)
            part = w_OI[:, begin:end]  # a view: what is corrected is the matrix
            gone = torch.zeros_like(part, dtype=torch.bool)
            if not isinstance(zeros, Pattern):
                count = round(zeros * end / width) - done
                gone = smallest((part.square() * cost_I[begin:end]).flatten(), count).view_as(part)
                done += count
            errors = torch.zeros_like(part)
            for at in range(end - begin):
                if isinstance(zeros, Pattern) and at % zeros.of == 0:
                    group = slice(at, at + zeros.of)
                    gone[:, group] = zeros.smallest(part[:, group].square() * cost_I[begin:end][group])
                row = u_II[begin + at, begin + at : end]
                errors[:, at] = torch.where(gone[:, at], part[:, at] / row[0], 0.0)
                part[:, at:] -= errors[:, at, None] * row
                part[:, at].masked_fill_(gone[:, at], 0)  # to the bit
            w_OI[:, end:] -= errors @ u_II[begin:end, end:]
        return w_OI
