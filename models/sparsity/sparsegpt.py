"""Weights go one column after another, and what is left of a row makes up for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.sparsity.method import Pattern, at_least_float, same_share, smallest


class Hessian:
    """The mean of 2 x xᵀ over tokens, Float32[I, I]: of the squared error of what a matrix gives, for every row."""

    def __init__(self, width: int) -> None:
        self.mean_II: Tensor | None = None
        self.width, self.tokens = width, 0

    def add(self, read_NI: Tensor) -> None:
        read_NI = at_least_float(read_NI)
        if self.mean_II is None:
            self.mean_II = read_NI.new_zeros(self.width, self.width)
        self.tokens += len(read_NI)
        self.mean_II *= 1 - len(read_NI) / self.tokens
        self.mean_II.addmm_(read_NI.T, read_NI, alpha=2 / self.tokens)


@dataclass(frozen=True)
class SparseGPT:
    """Optimal brain surgeon with one order of columns for all rows (arXiv:2301.00774).

    A weight w of column j costs w² / U_jj², U being the upper Cholesky factor of the inverse Hessian, whose square is
    the inverse Hessian's own entry once the columns before j are settled. What goes is chosen for `block` columns and
    all rows at once, or for N:M in each group of each row when its turn comes; the columns behind are corrected.
    Inputs that are always zero cost nothing and go first. Raises Refusal where the Hessian cannot be inverted.
    """

    damping: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 128
    needs_calibration_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise Refusal(f"sparsify.method.damping={self.damping}: need a number above 0; 0.01 is usual")
        if self.block < 1:
            raise Refusal(f"sparsify.method.block={self.block}: need at least 1; 128 is usual")

    def zeros(self, weights: Sequence[Tensor], fraction: float) -> list[int]:
        return same_share(weights, fraction)

    def reading(self, width: int) -> Hessian:
        return Hessian(width)

    def sparsified(self, weight_OI: Tensor, zeros: int | Pattern, read: Any) -> Tensor:
        w_OI = at_least_float(weight_OI).clone()
        u_II, dead_I = self._factor(read.mean_II.to(w_OI))
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

    def _factor(self, hessian_II: Tensor) -> tuple[Tensor, Tensor]:
        """The upper Cholesky factor of the damped inverse, and which inputs are always zero."""
        diagonal = hessian_II.diagonal()
        dead_I = diagonal == 0
        mean = diagonal[~dead_I].mean() if not dead_I.all() else diagonal.new_ones(())
        damped = hessian_II + torch.diag(torch.where(dead_I, mean, self.damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if failed or not bool(torch.isfinite(upper).all()):
            raise Refusal(
                f"sparsify.method.damping={self.damping}: the Hessian of what a matrix reads cannot be inverted; raise "
                f"it to {10 * self.damping:g}, or take more calibration rows"
            )
        return upper, dead_I
