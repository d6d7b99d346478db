"""Zeros in the matrices of the decoder layers: counted, and kept while the others are trained."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from models.errors import Refusal
from models.matrices import is_transposed, matrices
from models.representations import decoder_layers
from models.save import Weights, one_by_one
from models.sharding import gather_children


def counted(model: Any, weights: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, float]]:
    """Zeros and weights of each kind of matrix (q_proj of all layers are one kind), and of `all`. `weights`: of the
    layers, where they are not in the model."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    parameters = dict(model.named_parameters(remove_duplicate=False)) if weights is None else weights
    for matrix in matrices(model):
        weight = matrix.of(parameters[matrix.parameter])
        for kind in ("all", matrix.name):
            sums[kind][0] += int((weight == 0).sum())
            sums[kind][1] += weight.numel()
    return {
        kind: {"zeros": zeros, "weights": weights, "fraction": zeros / weights}
        for kind, (zeros, weights) in sums.items()
    }


def keep(model: Any) -> Any:
    """From now on training leaves every weight that is zero at zero. Nothing is stored beside the weights.

    A weight whose gradient is zero from the first step on has no momentum, and decay of zero is zero. Where adapters
    are trained (LoRA) and the weights stand still, the adapter counts only where its weight is not zero, so that
    merging fills nothing; that takes the sum of both, a matrix at a time, until the backward (with activation
    checkpointing of one layer only).
    """
    from peft.tuners.lora import Linear as Adapted

    adapted = [module for module in decoder_layers(model).modules() if isinstance(module, Adapted)]
    for module in adapted:
        _mask_adapter(module)
    for name in {} if adapted else dict.fromkeys(matrix.parameter for matrix in matrices(model)):
        _mask_gradient(model.get_parameter(name))
    return model


def _mask_gradient(parameter: nn.Parameter) -> None:
    # ZeRO-3 has the parameter gathered here: its layer's backward is what gives the gradient.
    parameter.register_hook(lambda gradient: gradient * (parameter != 0))


def _mask_adapter(module: Any) -> None:
    """PEFT's layer with W + [W ≠ 0] · scale · B A in place of W and its adapter one after the other."""
    (adapter,) = module.active_adapters
    base, whole = module.get_base_layer(), module.get_delta_weight
    transposed = is_transposed(base)

    def delta(name: str) -> Tensor:
        masked: Tensor = whole(name) * (base.weight != 0)
        return masked

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        weight = base.weight if module.merged else base.weight + delta(adapter)
        return nn.functional.linear(hidden, weight.T if transposed else weight, base.bias)

    module.get_delta_weight, module.forward = delta, forward  # merging asks for the first
    module.register_forward_pre_hook(gather_children)


def watched(start: Any, weights: Weights, counts: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """`weights` as they come: at their end `counts` has the zeros of the model that training began with (`start`), and
    those of what it came to. Raises Refusal where one was filled."""
    counts |= {"zeros_before": 0, "zeros_after": 0}
    parameters = dict(start.named_parameters(remove_duplicate=False))
    of: dict[str, list[Any]] = defaultdict(list)
    for matrix in matrices(start):
        of[matrix.parameter].append(matrix)
    for name, tensor in one_by_one(weights):
        for matrix in of.pop(name, ()):
            was, now = (matrix.of(each) == 0 for each in (parameters[name], tensor))
            if filled := int((was & ~now.to(was.device)).sum()):
                raise Refusal(
                    f"keep_zeros=true: {filled} of {int(was.sum())} zeros of {matrix} are no longer zero; nothing was "
                    f"written"
                )
            counts["zeros_before"] += int(was.sum())
            counts["zeros_after"] += int(now.sum())
        yield name, tensor
    assert not of, f"not saved: {', '.join(of)}"


def share(model: Any) -> float | None:
    """Zeros among all weights of the layers' matrices; None for a family whose layers are not supported."""
    try:
        return counted(model)["all"]["fraction"]
    except (Refusal, KeyError):
        return None
