"""What matrices read, on a grid too: by a scale of every token's own, or by one that calibration text has shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.errors import Refusal
from models.quantization.straight_through import straight_through

if TYPE_CHECKING:
    from models.quantization.record import Record

# N tokens, I what a matrix reads


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


class Largest:
    """The largest |x| that a matrix reads, of each input: Float32[I]."""

    def __init__(self, width: int) -> None:
        self.largest_I = torch.zeros(width)

    def add(self, read_NI: Tensor) -> None:
        self.largest_I = torch.maximum(self.largest_I.to(read_NI.device), read_NI.abs().amax(0).float())

    def divided(self, scale_I: Tensor) -> Largest:
        other = Largest(len(self.largest_I))
        other.largest_I = self.largest_I / scale_I
        return other


def attach(model: nn.Module, record: Record) -> list[RemovableHandle]:
    """Let a plain model read rounded activations in its quantized matrices, as the record says, until the handles are
    removed. Nothing for a record without activations."""
    if record.activations is None:
        return []
    handles = []
    for name in record.matrices:
        module = model.get_submodule(name.removesuffix(".weight"))
        handles.append(round_inputs(module, record.activations, record.input_scales.get(name)))
    return handles


def round_inputs(module: nn.Module, activations: Activations, scale: Tensor | None) -> RemovableHandle:
    """`scale`: Float32[], of static activations."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        own = None if scale is None else scale.to(inputs[0].device)
        return activations.rounded(inputs[0], own), *inputs[1:]

    return module.register_forward_pre_hook(hook)
