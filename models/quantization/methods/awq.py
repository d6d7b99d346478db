"""Activation-aware weight quantization: channels with large activations are scaled up before they are rounded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.hessian import Hessian
from models.quantization.methods.clipped import Clipped
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# N tokens, O outputs of a matrix, I its inputs, K channels of which several inputs may be one


class Magnitudes:
    """Of the inputs of a matrix: their second moments, and the mean of |x|, Float32[I]."""

    def __init__(self, width: int) -> None:
        self.hessian = Hessian(width)
        self.mean_I = torch.zeros(width)

    def add(self, read_NI: Tensor) -> None:
        self.hessian.add(read_NI)
        found_I = read_NI.abs().mean(0, dtype=torch.float32)
        self.mean_I = self.mean_I.to(found_I)
        self.mean_I += (found_I - self.mean_I) * len(read_NI) / self.hessian.tokens

    def divided(self, scale_I: Tensor) -> Magnitudes:
        other = Magnitudes(len(self.mean_I))
        other.hessian = self.hessian.divided(scale_I)
        other.mean_I = self.mean_I / scale_I
        return other


@dataclass(frozen=True)
class AWQ:
    """Activation-aware weight quantization (arXiv:2306.00978): inputs are scaled by (mean |x|)^ratio, normed to
    √(largest · smallest) = 1, weights the other way round.

    Of `ratios` ratios, 0 to below 1, the one with the least squared error of the outputs of the matrices that share an
    input, over all calibration tokens that each of them reads: with second moments H that of an error E of the weights
    is tr(E H Eᵀ), and no token need be kept. `clip`: then each group gets the range with the least error of its part of
    the output, down to half of the whole range.
    """

    ratios: int = 20
    clip: bool = True
    reading: ClassVar[type[Magnitudes]] = Magnitudes

    def __post_init__(self) -> None:
        if self.ratios < 1:
            raise Refusal(f"quantizer.ratios={self.ratios}: need at least 1; 20 is usual")

    def scales(self, readers: Sequence[tuple[Tensor, Any]], channel_I: Tensor, scheme: WeightScheme) -> Tensor:
        """Float32[K]. Channels whose activations are always zero keep 1."""
        mean_I, most = _mean(readers), max(read.hessian.tokens for _, read in readers)
        channel_I = channel_I.to(mean_I.device)
        number_K = channel_I.bincount()
        mean_K = torch.zeros(len(number_K), device=mean_I.device).index_add(0, channel_I, mean_I) / number_K
        best, least = torch.ones_like(mean_K), None
        for ratio in torch.arange(self.ratios) / self.ratios:
            tried_K = _scale(mean_K, float(ratio))
            tried_I = tried_K[channel_I]
            cost = sum(
                _cost(weight_OI, tried_I, scheme, read.hessian) * (read.hessian.tokens / most)
                for weight_OI, read in readers
            )
            if not math.isfinite(cost):
                raise Refusal("quantizer=awq: activations are NaN or infinite; check the model")
            if least is None or cost < least:
                best, least = tried_K, cost
        return best

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        if not self.clip:
            return scheme.quantize(weight_OI, *scheme.of_range(*scheme.ranges(weight_OI)))
        fitted = Clipped(steps=21, smallest=0.5).fitted(weight_OI, scheme, read.hessian.cost)
        return scheme.quantize(weight_OI, *fitted)


def _mean(readers: Sequence[tuple[Tensor, Any]]) -> Tensor:
    """Of |x| over all that the readers are given: one and the same, or to each expert its own tokens."""
    first = readers[0][1]
    if all(read is first for _, read in readers):
        mean_I: Tensor = first.mean_I
        return mean_I
    tokens = sum(read.hessian.tokens for _, read in readers)
    return torch.stack([read.mean_I * (read.hessian.tokens / tokens) for _, read in readers]).sum(0)


def _scale(mean_K: Tensor, ratio: float) -> Tensor:
    live_K = mean_K > 0
    if not live_K.any():
        return torch.ones_like(mean_K)
    scale_K = mean_K.pow(ratio).clamp(min=1e-4)
    middle = (scale_K[live_K].max() * scale_K[live_K].min()).sqrt()
    return torch.where(live_K, scale_K / middle, 1.0)


def _cost(weight_OI: Tensor, scale_I: Tensor, scheme: WeightScheme, hessian: Hessian) -> float:
    scaled_OI = weight_OI.float() * scale_I
    made = scheme.quantize(scaled_OI, *scheme.of_range(*scheme.ranges(scaled_OI)))
    return float(hessian.cost(made.dequantized() / scale_I - weight_OI.float()).sum())
