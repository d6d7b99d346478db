"""Second moments of a matrix's inputs, which weigh its squared error, and the factor that solves with them."""

from __future__ import annotations

import torch
from torch import Tensor

from models.errors import Refusal

# N tokens, I inputs of a matrix, O outputs, G groups of I


class Hessian:
    """The mean of 2 x xᵀ over tokens, Float32[I, I]: the Hessian of the squared error of each output."""

    def __init__(self, width: int) -> None:
        self.mean_II: Tensor | None = None
        self.width, self.tokens = width, 0

    def add(self, read_NI: Tensor) -> None:
        read_NI = read_NI.to(torch.promote_types(read_NI.dtype, torch.float32))
        if self.mean_II is None:
            self.mean_II = read_NI.new_zeros(self.width, self.width)
        self.tokens += len(read_NI)
        self.mean_II *= 1 - len(read_NI) / self.tokens
        self.mean_II.addmm_(read_NI.T, read_NI, alpha=2 / self.tokens)

    def divided(self, scale_I: Tensor) -> Hessian:
        """Of inputs that are each divided by their scale."""
        assert self.mean_II is not None
        other = Hessian(self.width)
        other.tokens = self.tokens
        other.mean_II = self.mean_II / (scale_I[:, None] * scale_I).to(self.mean_II)
        return other

    def cost(self, error_OI: Tensor, groups: int = 1) -> Tensor:
        """Float32[O, G]: what errors of a matrix's weights cost: twice the mean squared error of each output, by the
        group of inputs that causes it alone."""
        assert self.mean_II is not None
        error_GOS = error_OI.unflatten(1, (groups, -1)).transpose(0, 1)
        inside_GSS = self.mean_II.to(error_OI).unflatten(0, (groups, -1)).unflatten(2, (groups, -1))
        inside_GSS = inside_GSS.diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        return (error_GOS @ inside_GSS * error_GOS).sum(-1).T


def inverse_factor(hessian_II: Tensor, damping: float, setting: str) -> tuple[Tensor, Tensor]:
    """The upper Cholesky factor of the damped inverse, and Bool[I]: which inputs are always zero.

    `damping` is added to the diagonal, as a share of its mean. Raises Refusal, naming the `setting`, where even so
    there is no inverse.
    """
    diagonal = hessian_II.diagonal()
    dead_I = diagonal == 0
    mean = diagonal[~dead_I].mean() if not dead_I.all() else diagonal.new_ones(())
    damped = hessian_II + torch.diag(torch.where(dead_I, mean, damping * mean))
    lower, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not bool(torch.isfinite(upper).all()):
        raise Refusal(
            f"{setting}={damping}: the Hessian of a matrix's inputs cannot be inverted; raise it to "
            f"{10 * damping:g}, or take more calibration samples"
        )
    return upper, dead_I
