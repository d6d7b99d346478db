"""Training with the weights on their grid: quantization-aware, by a straight-through estimator.

The float weights stay where they are and are what is trained; every forward multiplies with what the grid makes of
them, which is what will be exported, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.layerwise import Matrix, matrices
from models.lora import merge
from models.quantization import cache
from models.quantization.grid import SCALE_DTYPES, Grid
from models.quantization.methods.clipped import Clipped
from models.quantization.record import Record
from models.quantization.straight_through import straight_through
from models.sharding import gather_children

SCALES = ("learned", "frozen", "min_max", "mse")
OWN = ("log_ratio", "scale_bits", "zero_point")  # what a module is given beside its weight

# O what a matrix gives, I what it reads, G groups of I, S = I / G


@dataclass(frozen=True)
class QAT:
    """`scales`: learned, by their own gradient (LSQ, arXiv:1902.08153), as factors on those training starts with, so
    that a step changes them relatively and they stay positive; frozen, as training starts with; or of the present
    weights at every step, whole range (min_max) or the part of least squared error (mse), until `freeze_step`."""

    scales: str = "learned"
    freeze_step: int | None = None
    cache: str | None = None  # of models.quantization.cache: keys and values are rounded too, as a runtime keeps them

    def __post_init__(self) -> None:
        if self.scales not in SCALES:
            raise Refusal(f"qat.scales={self.scales}: need one of {', '.join(SCALES)}")
        if self.freeze_step is not None and (not self._follow or self.freeze_step < 0):
            raise Refusal(
                f"qat.freeze_step={self.freeze_step} with scales={self.scales}: need a step from 0 on, of scales that "
                f"follow the weights (min_max, mse)"
            )

    @property
    def _follow(self) -> bool:
        return self.scales in ("min_max", "mse")

    def follows(self, step: int | None) -> bool:
        """Whether scales are those of the present weights at this step; not before the first."""
        return self._follow and step is not None and (self.freeze_step is None or step < self.freeze_step)


class OnGrid:
    """The matrices of one model, and what they are rounded with while it trains."""

    def __init__(self, settings: QAT, record: Record, plain: Any) -> None:
        """`plain`: a model of the architecture, be it without memory. Raises Refusal where the record is of another."""
        self.settings, self.record = settings, record
        self.step: int | None = None  # whoever trains keeps it up to date; before, scales are as they were left
        by_name = {str(matrix): matrix for matrix in matrices(plain)}
        if odd := [name for name in record.matrices if name not in by_name]:
            raise Refusal(f"qat: the model has no matrix {odd[0]}, which its grid.safetensors names")
        self._taken = [by_name[name] for name in record.matrices]
        check_trainable(self._taken)

    def attach(self, model: Any) -> Any:
        """From now on the record's matrices are multiplied as their grid says; adapters (PEFT) are on it with the
        weight they are added to, fq(W + BA), as that is what they are merged into."""
        for matrix in self._taken:
            self._wrap(model.get_submodule(_module(matrix)), matrix)
        if self.settings.cache is not None:
            self._attention = cache.attach(model)
        return model

    @contextmanager
    def served(self, model: Any) -> Iterator[None]:
        """In it a settled model rounds what it reads and caches, as it did in training and will where it is served."""
        handles = []
        for matrix in self._taken:
            read = self._reading(matrix)
            module = model.get_submodule(_module(matrix))
            handles.append(module.register_forward_pre_hook(lambda _, inputs, read=read: (read(inputs[0]),)))
        before = None if self.settings.cache is None else cache.attach(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if before is not None:
                cache.detach(model, before)

    @torch.no_grad()
    def settle(self, model: Any) -> Record:
        """A trained model plain again, adapters merged, its weights on the grid; and what they are made of."""
        owned = {}
        for matrix in self._taken:
            module = model.get_submodule(_module(matrix))
            owned[matrix] = {name: getattr(module, name, None) for name in OWN}
            for name in ("forward", *(name for name, tensor in owned[matrix].items() if tensor is not None)):
                delattr(module, name)
        merge(model)
        if self.settings.cache is not None:
            cache.detach(model, self._attention)
        made = {}
        for matrix in self._taken:
            weight_OI = matrix.of(model.get_parameter(matrix.parameter))
            quantized = self.record.grid.nearest(weight_OI, *self._grid_of(weight_OI, owned[matrix]))
            weight_OI.copy_(quantized.dequantized())
            made[str(matrix)] = quantized
        return replace(self.record, matrices=made, cache=self.settings.cache)

    def _wrap(self, module: Any, matrix: Matrix) -> None:
        quantized = self.record.matrices[str(matrix)]
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        device = base.weight.device
        # As integers: engines that cast a model to bf16 cast its buffers too.
        module.register_buffer("scale_bits", quantized.scale.to(device).view(torch.int32))
        module.register_buffer("zero_point", quantized.zero_point.to(device))
        if self.settings.scales == "learned":
            # In one dimension, so that weight decay, which pulls to where training began, leaves it alone.
            module.log_ratio = nn.Parameter(
                torch.zeros(quantized.scale.numel(), dtype=base.weight.dtype, device=device)
            )
        read = self._reading(matrix)

        def whole() -> Tensor:
            if module is base or module.merged:
                return base.weight
            (adapter,) = module.active_adapters
            return base.weight + module.get_delta_weight(adapter)

        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            hidden = read(hidden)
            weight_OI = whole().T if matrix.transposed else whole()
            return nn.functional.linear(hidden, self._rounded(module, weight_OI).to(weight_OI), base.bias)

        module.forward = forward
        if module is not base:
            module.register_forward_pre_hook(gather_children)

    def _reading(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        """What becomes of what a matrix is given to read."""
        activations, static = self.record.activations, self.record.input_scales.get(str(matrix))
        if activations is None:
            return lambda hidden: hidden
        return lambda hidden: activations.rounded(hidden, None if static is None else static.to(hidden.device))

    def _rounded(self, module: Any, weight_OI: Tensor) -> Tensor:
        """Float32[O, I]: fq(W)."""
        own = {name: getattr(module, name, None) for name in OWN}
        scale, zero_point = self._grid_of(weight_OI, own)
        if self.settings.follows(self.step):
            module.scale_bits.copy_(scale.view(torch.int32))
            module.zero_point.copy_(zero_point)
        return rounded(weight_OI, scale, zero_point, self.record.grid)

    def _grid_of(self, weight_OI: Tensor, own: Mapping[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """(scale, zero_point) of the present step, the scale with a gradient where it is learned."""
        grid, bits, zero_point = self.record.grid, own["scale_bits"], own["zero_point"]
        assert bits is not None
        assert zero_point is not None
        if self.settings.follows(self.step):
            detached = weight_OI.detach()
            fitted = Clipped().fitted(detached, grid) if self.settings.scales == "mse" else None
            return fitted or grid.of_range(*grid.ranges(detached))
        start = bits.view(torch.float32)
        if (log_ratio := own["log_ratio"]) is None:
            return start, zero_point
        exact = start * log_ratio.float().exp().view(start.shape)
        return straight_through(exact, held(exact.detach(), grid)), zero_point


def held(scale: Tensor, grid: Grid) -> Tensor:
    """Learned scales as an export will hold them: neither zero nor infinite there."""
    limits = torch.finfo(SCALE_DTYPES[grid.scale_dtype])
    return scale.clamp(limits.tiny * limits.eps, limits.max).to(SCALE_DTYPES[grid.scale_dtype]).float()


def rounded(weight_OI: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Float32[O, I]: what `grid.nearest` says, to the bit, with gradients for the weight (of what is in range) and the
    scale, Float32[O | 1, G] (LSQ's: q − w / s in range, q outside)."""
    exact = weight_OI.float().unflatten(1, (scale.shape[1], -1)) / scale[..., None] + zero_point[..., None]
    inside = exact.clamp(grid.lowest, grid.highest)
    integers_OGS = straight_through(inside, inside.detach().round())
    return (scale[..., None] * (integers_OGS - zero_point[..., None])).flatten(1)


def check_trainable(taken: Sequence[Matrix]) -> None:
    """Raises Refusal for experts: they are one operation, whose weights cannot be rounded on the way."""
    if experts := [matrix for matrix in taken if matrix.slot is not None]:
        raise Refusal(
            f"qat: {experts[0].parameter} is of experts, which train as one operation; leave them as they are with "
            f"stages.quantize.skip=[{experts[0].name}]"
        )


def _module(matrix: Matrix) -> str:
    return matrix.parameter.removesuffix(".weight")
