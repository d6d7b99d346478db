"""Quantization-aware training, from what the stage `quantize` has made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.matrices import Matrix, matrices
from models.quantization.aware import Rounding, check_trainable
from models.quantization.methods.clipped import Clipped
from models.quantization.scheme import SCALE_DTYPES, QuantizedMatrix, WeightScheme
from models.quantization.stored import Outline, QuantizedWeights, read_quantized
from models.quantization.straight_through import straight_through

SCALES = ("learned", "frozen", "min_max", "mse")

# O outputs of a matrix, I its inputs, G groups of I, S = I / G


@dataclass(frozen=True)
class QAT:
    """`scales`: learned, by their own gradient (LSQ, arXiv:1902.08153), as factors on those training starts with, so
    that a step changes them relatively and they stay positive; frozen, as training starts with; or of the present
    weights at every step, whole range (min_max) or the part of least squared error (mse), until `freeze_step`."""

    scales: str = "learned"
    freeze_step: int | None = None
    cache: str | None = None
    needs_quantized: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise Refusal(f"qat.scales={self.scales}: need one of {', '.join(SCALES)}")
        if self.freeze_step is not None and (not self._follow or self.freeze_step < 0):
            raise Refusal(
                f"qat.freeze_step={self.freeze_step} with scales={self.scales}: need a step from 0 on, of scales that "
                f"follow the weights (min_max, mse)"
            )

    @property
    def multiple(self) -> int:
        return 1  # the groups are those of the scheme that the stage quantize has

    @property
    def _follow(self) -> bool:
        return self.scales in ("min_max", "mse")

    def follows(self, step: int | None) -> bool:
        """Whether scales are those of the present weights at this step; not before the first."""
        return self._follow and step is not None and (self.freeze_step is None or step < self.freeze_step)

    def outline(self, plain: Any, start: Outline | None) -> Outline:
        if start is None or start.scheme is None:
            raise Refusal(
                "quantization-aware training starts from a quantized model, and the student is not; quantize it first"
            )
        check_trainable([matrix for matrix in matrices(plain) if str(matrix) in start.shapes])
        return start

    def open(self, quantized: Path, plain: Any) -> Rounding:
        """Raises Refusal where the integers are of another model."""
        return rounding_of(self, read_quantized(quantized), plain)


def rounding_of(settings: QAT, start: QuantizedWeights, plain: Any) -> Rounding:
    by_name = {str(matrix): matrix for matrix in matrices(plain)}
    if odd := [name for name in start.matrices if name not in by_name]:
        raise Refusal(f"the model has no matrix {odd[0]}, which quantized.safetensors names")
    return Rounding(SchemeRule(settings, start), [by_name[name] for name in start.matrices], settings.cache)


class SchemeRule:
    """A models.quantization.aware.Rule."""

    own: Sequence[str] = ("log_ratio", "scale_bits", "zero_point")

    def __init__(self, settings: QAT, start: QuantizedWeights) -> None:
        self.settings, self.start, self.scheme = settings, start, start.scheme.weights
        self.step: int | None = None

    def give(self, module: Any, base: Any, matrix: Matrix) -> None:
        quantized, device = self.start.matrices[str(matrix)], base.weight.device
        # As integers: engines that cast a model to bf16 cast its buffers too.
        module.register_buffer("scale_bits", quantized.scale.to(device).view(torch.int32))
        module.register_buffer("zero_point", quantized.zero_point.to(device))
        if self.settings.scales == "learned":
            # In one dimension, so that weight decay, which pulls to where training began, leaves it alone.
            zeros = torch.zeros(quantized.scale.numel(), dtype=base.weight.dtype, device=device)
            module.log_ratio = nn.Parameter(zeros)

    def rounded(self, module: Any, weight_OI: Tensor, matrix: Matrix) -> Tensor:
        owned = {name: getattr(module, name, None) for name in self.own}
        scale, zero_point = self._scales_of(weight_OI, owned)
        if self.settings.follows(self.step) and module.training:  # validation comes after the step it belongs to
            module.scale_bits.copy_(scale.view(torch.int32))
            module.zero_point.copy_(zero_point)
        return rounded(weight_OI, scale, zero_point, self.scheme)

    def reading(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        activations, static = self.start.scheme.activations, self.start.input_scales.get(str(matrix))
        if activations is None:
            return lambda hidden: hidden
        return lambda hidden: activations.rounded(hidden, None if static is None else static.to(hidden.device))

    def held(self, weight_OI: Tensor, matrix: Matrix, owned: Mapping[str, Tensor | None]) -> QuantizedMatrix:
        return self.scheme.quantize(weight_OI, *self._scales_of(weight_OI, owned))

    def stored(self, made: Mapping[str, Any], cache: str | None) -> QuantizedWeights:
        return replace(self.start, matrices=made, cache=cache)

    def _scales_of(self, weight_OI: Tensor, owned: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of the present step, the scale with a gradient where it is learned."""
        scheme, bits, zero_point = self.scheme, owned["scale_bits"], owned["zero_point"]
        assert bits is not None
        assert zero_point is not None
        if self.settings.follows(self.step):
            detached = weight_OI.detach()
            fitted = Clipped().fitted(detached, scheme) if self.settings.scales == "mse" else None
            return fitted or scheme.of_range(*scheme.ranges(detached))
        start = bits.view(torch.float32)
        if (log_ratio := owned["log_ratio"]) is None:
            return start, zero_point
        exact = start * log_ratio.float().exp().view(start.shape)
        return straight_through(exact, held(exact.detach(), scheme)), zero_point


def held(scale: Tensor, scheme: WeightScheme) -> Tensor:
    """Learned scales as an export will hold them: neither zero nor infinite there."""
    limits = torch.finfo(SCALE_DTYPES[scheme.scale_dtype])
    return scale.clamp(limits.tiny * limits.eps, limits.max).to(SCALE_DTYPES[scheme.scale_dtype]).float()


def rounded(weight_OI: Tensor, scale: Tensor, zero_point: Tensor, scheme: WeightScheme) -> Tensor:
    """Float32[O, I]: what `scheme.quantize` gives, to the bit, with gradients for the weight (of what is in range)
    and the scale, Float32[O | 1, G] (LSQ's: q − w / s in range, q outside)."""
    exact = weight_OI.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None] + zero_point[..., None]
    inside = exact.clamp(scheme.lowest, scheme.highest)
    integers_OGS = straight_through(inside, inside.detach().round())
    return (scale[..., None] * (integers_OGS - zero_point[..., None])).flatten(1)
