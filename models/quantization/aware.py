"""Training with matrices rounded on the way: quantization-aware, by a straight-through estimator.

The float weights stay where they are and are what is trained; every forward multiplies with what becomes of them in an
export, to the bit. (Under autocast adapters are multiplied in bf16: a few of their integers may fall to the next.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.lora import merge
from models.matrices import Matrix
from models.quantization import cache as caches
from models.quantization.ggml import Blocks
from models.quantization.scheme import QuantizedMatrix
from models.quantization.stored import BlockWeights, Outline, QuantizedWeights
from models.sharding import gather_children

# O outputs of a matrix, I its inputs


@runtime_checkable
class Aware(Protocol):
    """How matrices are rounded in training: the contract of conf/qat/*.yaml."""

    cache: str | None  # of models.quantization.cache: keys and values are rounded too, as a runtime keeps them
    needs_quantized: ClassVar[bool]  # whether training starts from what the stage quantize has made

    @property
    def multiple(self) -> int:
        """What the inputs of every matrix have to be a multiple of, as models.formats.format.Format has it; 1 where any
        width can be trained."""
        ...

    def outline(self, plain: Any, start: Outline | None) -> Outline:
        """What the result will be made of; `start`: what training starts from. Raises Refusal for what cannot be
        trained so."""
        ...

    def open(self, quantized: Path, plain: Any) -> Rounding:
        """`quantized`: the file beside the weights that training starts from. `plain`: a model of the
        architecture, be it without memory."""
        ...


class Rule(Protocol):
    """What one kind of rounding does to its modules."""

    step: int | None  # of training; whoever trains keeps it up to date. None: not begun

    @property
    def own(self) -> Sequence[str]:
        """Names of the tensors that a module is given beside its weight."""
        ...

    def give(self, module: Any, base: Any, matrix: Matrix) -> None:
        """Add to a module what its rounding needs. `base`: the module, or the one that its adapter wraps."""
        ...

    def rounded(self, module: Any, weight_OI: Tensor, matrix: Matrix) -> Tensor:
        """Float32[O, I], with gradients."""
        ...

    def reading(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        """The function that rounds the inputs of a matrix."""
        ...

    def held(self, weight_OI: Tensor, matrix: Matrix, owned: Mapping[str, Tensor | None]) -> QuantizedMatrix | Blocks:
        """What an export will hold of a trained weight; `owned`: the tensors that its module was given."""
        ...

    def stored(self, made: Mapping[str, Any], cache: str | None) -> QuantizedWeights | BlockWeights: ...


class Rounding:
    """The matrices of one model that are rounded while it trains."""

    def __init__(self, rule: Rule, taken: Sequence[Matrix], cache: str | None) -> None:
        check_trainable(taken)
        self.rule, self.taken, self.cache = rule, taken, cache

    def attach(self, model: Any) -> Any:
        """From now on the matrices are multiplied as they are rounded; adapters (PEFT) with the weight they are added
        to, fq(W + BA), as that is what they are merged into."""
        for matrix in self.taken:
            self._wrap(model.get_submodule(_module(matrix)), matrix)
        if self.cache is not None:
            self._attention = caches.attach(model)
        return model

    @contextmanager
    def served(self, model: Any) -> Iterator[None]:
        """In it a settled model rounds activations and its cache, as it did in training and will where it is served."""
        handles = []
        for matrix in self.taken:
            read, module = self.rule.reading(matrix), model.get_submodule(_module(matrix))
            handles.append(module.register_forward_pre_hook(lambda _, inputs, read=read: (read(inputs[0]),)))
        before = None if self.cache is None else caches.attach(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            if before is not None:
                caches.detach(model, before)

    @torch.no_grad()
    def settle(self, model: Any) -> QuantizedWeights | BlockWeights:
        """A trained model plain again, adapters merged, its weights as they were multiplied; and what they are made
        of."""
        owned = {}
        for matrix in self.taken:
            module = model.get_submodule(_module(matrix))
            owned[matrix] = {name: getattr(module, name, None) for name in self.rule.own}
            for name in ("forward", *(name for name, tensor in owned[matrix].items() if tensor is not None)):
                delattr(module, name)
        merge(model)
        if self.cache is not None:
            caches.detach(model, self._attention)
        made = {}
        for matrix in self.taken:
            weight_OI = matrix.of(model.get_parameter(matrix.parameter))
            made[str(matrix)] = self.rule.held(weight_OI, matrix, owned[matrix])
            weight_OI.copy_(made[str(matrix)].dequantized())
        return self.rule.stored(made, self.cache)

    def _wrap(self, module: Any, matrix: Matrix) -> None:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        self.rule.give(module, base, matrix)
        read = self.rule.reading(matrix)

        def whole() -> Tensor:
            if module is base or module.merged:
                return base.weight
            (adapter,) = module.active_adapters
            return base.weight + module.get_delta_weight(adapter)

        def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            weight_OI = whole().T if matrix.transposed else whole()
            return nn.functional.linear(
                read(hidden), self.rule.rounded(module, weight_OI, matrix).to(weight_OI), base.bias
            )

        module.forward = forward
        if module is not base:
            module.register_forward_pre_hook(gather_children)


def check_trainable(taken: Sequence[Matrix]) -> None:
    """Raises Refusal for experts: they are one operation, whose weights cannot be rounded inside it."""
    if experts := [matrix for matrix in taken if matrix.slot is not None]:
        raise Refusal(
            f"quantization-aware training: {experts[0].parameter} is of experts, which train as one operation; leave "
            f"them as they are with skip=[{experts[0].name}]"
        )


def _module(matrix: Matrix) -> str:
    return matrix.parameter.removesuffix(".weight")
