"""SmoothQuant: outliers of the activations are moved into the weights, for both in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.activations import Largest
from models.quantization.scheme import QuantizedMatrix, WeightScheme

# O outputs of a matrix, I its inputs, K channels of which several inputs may be one


@dataclass(frozen=True)
class SmoothQuant:
    """Inputs are divided by s = max |x|^strength / max |w|^(1 − strength) (arXiv:2211.10438), each channel by its own
    maxima over all tokens and over all weights that it is multiplied by; then weights are rounded to nearest."""

    strength: float = 0.5
    reading: ClassVar[type[Largest]] = Largest

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise Refusal(f"quantizer.strength={self.strength}: need [0, 1]; 0.5 shares between weights and inputs")

    def scales(self, readers: Sequence[tuple[Tensor, Any]], channel_I: Tensor, scheme: WeightScheme) -> Tensor:
        """Float32[K]. A channel whose activations or weights are all zero keeps 1."""
        read_I = torch.stack([read.largest_I for _, read in readers]).amax(0)
        weight_I = torch.stack([weight_OI.abs().amax(0).float() for weight_OI, _ in readers]).amax(0)
        channel_I = channel_I.to(read_I.device)
        nothing_K = torch.zeros(int(channel_I.max()) + 1, device=read_I.device)
        read_K, weight_K = (nothing_K.scatter_reduce(0, channel_I, each, "amax") for each in (read_I, weight_I))
        scale_K = read_K.pow(self.strength) / weight_K.pow(1 - self.strength)
        return torch.where((read_K > 0) & (weight_K > 0), scale_K, 1.0)

    def quantized(self, weight_OI: Tensor, scheme: WeightScheme, read: Any) -> QuantizedMatrix:
        return scheme.quantize(weight_OI, *scheme.of_range(*scheme.ranges(weight_OI)))
