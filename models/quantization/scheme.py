"""Quantization schemes: how many bits weights and activations have, and which of them share a scale.

Every scale is rounded to the dtype in which an export will hold it before a weight is rounded with it: whoever opens
the export multiplies the same integers with the same scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import Refusal
from models.quantization.straight_through import straight_through

GRANULARITIES = ("tensor", "channel", "group")
SCALE_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# O outputs of a matrix, I its inputs, G groups of I, S = I / G


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [O, I] as integers. `scale` and `zero_point` lie so that they spread over groups: [O | 1, G]."""

    integers: Tensor  # Int32[O, I]
    scale: Tensor  # Float32, each a number of the scheme's scale_dtype
    zero_point: Tensor  # Int32; 0 where the scheme is symmetric

    @property
    def shape(self) -> tuple[int, int]:
        return self.integers.shape[0], self.integers.shape[1]

    def dequantized(self) -> Tensor:
        """Float32[O, I]: scale · (integer − zero_point)."""
        width = self.integers.shape[1] // self.scale.shape[1]
        integers_OGS = self.integers.unflatten(1, (-1, width))
        return (self.scale[..., None] * (integers_OGS - self.zero_point[..., None])).flatten(1)


@dataclass(frozen=True)
class WeightScheme:
    """2^bits integers around zero, or (asymmetric) from 0 up with one of them, the zero point, standing for zero.

        symmetric:   s = max |w| / (2^(bits−1) − 1)       q = round(w / s)        in [−2^(bits−1), 2^(bits−1) − 1]
        asymmetric:  s = (max w − min w) / (2^bits − 1)   q = round(w / s + z)    in [0, 2^bits − 1]
                     z = round(−min w / s)

    A range that leaves zero out is widened to hold it, as z has the integers' bits; then also a group of equal weights
    is exact, but for the rounding of s to `scale_dtype`. A group of zeros has scale 1, and so has one so small (below
    2e-7 in float16 at 4 bits) that its s is zero there. `granularity`: one scale for a tensor, for each output
    (channel), or for each `group_size` neighbouring inputs of an output. Halves are rounded to even.
    """

    bits: int = 4
    granularity: str = "group"
    group_size: int | None = 128  # of granularity=group
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise Refusal(f"scheme.weights.bits={self.bits}: need 2 to 8")
        if self.granularity not in GRANULARITIES:
            raise Refusal(f"scheme.weights.granularity={self.granularity}: need one of {', '.join(GRANULARITIES)}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise Refusal(
                f"scheme.weights.group_size={self.group_size} with granularity={self.granularity}: a group needs a "
                f"size, and nothing else has one"
            )
        if self.group_size is not None and self.group_size < 1:
            raise Refusal(f"scheme.weights.group_size={self.group_size}: need 1 or more; 128 is usual")
        if self.scale_dtype not in SCALE_DTYPES:
            raise Refusal(f"scheme.weights.scale_dtype={self.scale_dtype}: need one of {', '.join(SCALE_DTYPES)}")

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.symmetric else 2**self.bits - 1

    def width(self, inputs: int) -> int:
        """How many neighbours share a scale."""
        return self.group_size or inputs

    def bits_per_weight(self, shape: tuple[int, int]) -> float:
        """Of a matrix [O, I], scales and zero points counted."""
        outputs, inputs = shape
        scales = 1 if self.granularity == "tensor" else outputs * (inputs // self.width(inputs))
        own = torch.finfo(SCALE_DTYPES[self.scale_dtype]).bits + (0 if self.symmetric else self.bits)
        return self.bits + scales * own / (outputs * inputs)

    def check(self, inputs: Mapping[str, int]) -> None:
        """Raises Refusal where groups do not divide the inputs of a matrix (name → inputs), with sizes that divide
        those of all."""
        odd = {name: count for name, count in inputs.items() if count % self.width(count)}
        if not odd:
            return
        fit = [str(size) for size in (256, 128, 64, 32, 16, 8, 4) if not any(n % size for n in inputs.values())]
        channel = "scheme.weights.granularity=channel with scheme.weights.group_size=null"
        wide = all(self.width(count) < count for count in odd.values())
        prune = f", prune the width with prune.multiple_of={self.group_size}" if wide else ""
        name, count = next(iter(odd.items()))
        names = dict.fromkeys(each.split(".")[-2] if "." in each else each for each in odd)
        skip = f", or leave out those with quantize.skip=[{','.join(names)}]" if len(odd) < len(inputs) else ""
        raise Refusal(
            f"scheme.weights.group_size={self.group_size}: {name} has {count} inputs, which it does not divide; need "
            f"{' or '.join([*fit, channel])}{prune}{skip}"
        )

    def of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of ranges that have to be represented, of any shape. Raises Refusal for NaN and ∞."""
        if not bool(torch.isfinite(low).all() & torch.isfinite(high).all()):
            raise Refusal("quantizing: a weight is NaN or infinite; check the training that it comes from")
        low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
        if self.symmetric:
            scale = self._held(torch.maximum(-low, high) / self.highest)
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        scale = self._held((high - low) / self.highest)
        return scale, (-low / scale).round().clamp(0, self.highest).int()

    def _held(self, scale: Tensor) -> Tensor:
        held = scale.to(SCALE_DTYPES[self.scale_dtype]).float()
        if not bool(torch.isfinite(held).all()):
            raise Refusal(
                f"scheme.weights.scale_dtype={self.scale_dtype}: a scale of {float(scale.max()):.3g} is beyond it; use "
                f"bfloat16"
            )
        # What is zero there would divide by nothing: all its integers are zero with any scale.
        return torch.where(held == 0, 1.0, held)

    def ranges(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """Lowest and highest weight of each that shares a scale: Float[O | 1, G] each."""
        if self.granularity == "tensor":
            return weight_OI.amin().view(1, 1), weight_OI.amax().view(1, 1)
        groups_OGS = weight_OI.unflatten(1, (-1, self.width(weight_OI.shape[1])))
        return groups_OGS.amin(-1), groups_OGS.amax(-1)

    def integers(self, weight_OI: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Int32[O, I]: each weight rounded to the nearest, by the scale of its group."""
        groups_OGS = weight_OI.float().unflatten(1, (scale.shape[1], -1))
        found = (groups_OGS / scale[..., None] + zero_point[..., None]).round()
        return found.clamp(self.lowest, self.highest).int().flatten(1)

    def quantize(self, weight_OI: Tensor, scale: Tensor, zero_point: Tensor) -> QuantizedMatrix:
        return QuantizedMatrix(self.integers(weight_OI, scale, zero_point), scale, zero_point)


@dataclass(frozen=True)
class Activations:
    """Inputs of the quantized matrices, rounded too.

    s = max |x| / (2^(bits−1) − 1), of a token where `dynamic`, else over all calibration text; q = round(x / s), in
    [−2^(bits−1), 2^(bits−1) − 1]. A token of zeros has scale 1. Halves are rounded to even.
    """

    bits: int = 8
    dynamic: bool = True

    def __post_init__(self) -> None:
        if not 4 <= self.bits <= 8:
            raise Refusal(f"scheme.activations.bits={self.bits}: need 4 to 8")

    @property
    def highest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scale(self, largest: Tensor) -> Tensor:
        """Float32, of the largest magnitudes."""
        scale = largest.float() / self.highest
        return torch.where(scale == 0, 1.0, scale)

    def rounded(self, read: Tensor, scale: Tensor | None = None) -> Tensor:
        """`read` [..., I] quantized and dequantized, in its own dtype; the backward takes it for `read` itself, where
        that is in range. `scale`: of static activations, Float32[]."""
        if scale is None:
            scale = self.scale(read.detach().abs().amax(-1, keepdim=True))
        exact = read.float()
        inside = (exact / scale).clamp(-self.highest - 1, self.highest)  # no gradient from outside the range
        return (scale * straight_through(inside, inside.round())).to(read)


@dataclass(frozen=True)
class Scheme:
    """What a model is quantized to. It prints as the field writes it: W4A16 g128, W8A8 dynamic."""

    weights: WeightScheme
    activations: Activations | None = None  # None: in 16 bits or more, as the model computes them

    @property
    def multiple(self) -> int:
        """What the inputs of a quantized matrix have to be a multiple of, as models.formats.format.Format has it."""
        return self.weights.group_size or 1

    def __str__(self) -> str:
        weights, activations = self.weights, self.activations
        parts = [f"W{weights.bits}A{16 if activations is None else activations.bits}"]
        if weights.granularity == "group":
            parts.append(f"g{weights.group_size}")
        elif weights.granularity == "tensor":
            parts.append("tensor")
        if not weights.symmetric:
            parts.append("asymmetric")
        if activations is not None:
            parts.append("dynamic" if activations.dynamic else "static")
        return " ".join(parts)
