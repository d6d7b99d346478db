"""Rounding the activations of a plain model by its scheme: each token with its own scale, or with a calibrated one."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.quantization.scheme import Activations
from models.quantization.stored import QuantizedWeights

# N tokens, I inputs of a matrix


class Largest:
    """The largest |x| of each input of a matrix: Float32[I]."""

    def __init__(self, width: int) -> None:
        self.largest_I = torch.zeros(width)

    def add(self, read_NI: Tensor) -> None:
        self.largest_I = torch.maximum(self.largest_I.to(read_NI.device), read_NI.abs().amax(0).float())

    def divided(self, scale_I: Tensor) -> Largest:
        other = Largest(len(self.largest_I))
        other.largest_I = self.largest_I / scale_I
        return other


def attach(model: nn.Module, quantized: QuantizedWeights) -> list[RemovableHandle]:
    """Round the inputs of a plain model's quantized matrices until the handles are removed. Does nothing where the
    scheme leaves activations alone."""
    activations = quantized.scheme.activations
    if activations is None:
        return []
    handles = []
    for name in quantized.matrices:
        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(round_inputs(module, activations, quantized.input_scales.get(name)))
    return handles


def round_inputs(module: nn.Module, activations: Activations, scale: Tensor | None) -> RemovableHandle:
    """`scale`: Float32[], of static activations."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = None if scale is None else scale.to(inputs[0].device)
        return activations.rounded(inputs[0], own), *inputs[1:]

    return module.register_forward_pre_hook(hook)
