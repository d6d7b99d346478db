"""Weights are rounded one column after another, and the columns behind correct the error of each rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.hessian import Hessian, inverse_factor
from models.quantization.methods.clipped import Clipped
from models.quantization.scheme import QuantizedMatrix, WeightScheme


@dataclass(frozen=True)
class GPTQ:
    """Optimal brain quantization with one order of columns for all rows (arXiv:2210.17323).

    With U the upper Cholesky factor of the inverse Hessian of the inputs, rounding column j by e changes the
    columns behind it by −e U_j / U_jj. `act_order`: the columns with the largest activations come first; scales are
    then found beforehand, so that groups stay neighbours and no container needs an order. Without it a group's scale is
    found when its turn comes, from its corrected weights. `clip`: by least squared error instead of the whole range.
    """

    damping: float = 0.01  # added to the diagonal, as a share of its mean
    block: int = 128
    act_order: bool = True
    clip: bool = True
    reading: ClassVar[type[Hessian]] = Hessian
    scales: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise Refusal(f"quantizer.damping={self.damping}: need a number above 0; 0.01 is usual")
        if self.block < 1:
            raise Refusal(f"quantizer.block={self.block}: need at least 1; 128 is usual")

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        w_OI = weight_OI.float().clone()
        width = w_OI.shape[1]
        hessian_II = read.mean_II.to(w_OI)
        diagonal = hessian_II.diagonal()
        order_I = diagonal.argsort(descending=True) if self.act_order else torch.arange(width, device=w_OI.device)
        scale, zero_point = self._fitted(w_OI, scheme)
        dead_I = diagonal == 0
        w_OI[:, dead_I] = 0  # nothing is ever multiplied with them, and they would only be carried along
        w_OI, hessian_II = w_OI[:, order_I], hessian_II[order_I][:, order_I]
        u_II, _ = inverse_factor(hessian_II, self.damping, "quantizer.damping")
        integers_OI = torch.empty_like(w_OI, dtype=torch.int32)
        shared = scheme.width(width)
        for begin in range(0, width, self.block):
            end = min(begin + self.block, width)
            part = w_OI[:, begin:end]  # a view: what is corrected is the matrix
            errors = torch.zeros_like(part)
            for at in range(end - begin):
                column = begin + at
                group = int(order_I[column]) // shared
                if not self.act_order and column % shared == 0 and column and scheme.granularity == "group":
                    # Columns beyond this block have not been corrected yet by this block's errors.
                    now = w_OI[:, column : column + shared].clone()
                    now[:, end - column :] -= errors[:, :at] @ u_II[begin:column, end : column + shared]
                    of_group = self._fitted(now, scheme)
                    scale[:, group], zero_point[:, group] = of_group[0][:, 0], of_group[1][:, 0]
                mine = scale[:, group, None], zero_point[:, group, None]
                rounded = scheme.quantize(part[:, at, None], *mine)
                integers_OI[:, column] = rounded.integers[:, 0]
                errors[:, at] = (part[:, at] - rounded.dequantized()[:, 0]) / u_II[column, column]
                part[:, at:] -= errors[:, at, None] * u_II[column, column:end]
            w_OI[:, end:] -= errors @ u_II[begin:end, end:]
        return QuantizedMatrix(integers_OI[:, order_I.argsort()], scale, zero_point)

    def _fitted(self, weight_OI: Tensor, scheme: WeightScheme) -> tuple[Tensor, Tensor]:
        if self.clip:
            return Clipped().fitted(weight_OI, scheme)
        return scheme.of_range(*scheme.ranges(weight_OI))
