"""What is lost with a unit: the contract of conf/importance/*.yaml, and what the importances share.

Scores are Float64[units] for every group; of layers only where an importance knows them. A larger one is kept. They are
reduced to units as soon as they are known, weight by weight: no second copy of weights or gradients is ever whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.pruning.groups import Anatomy, Axis, Group

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda values: values.sum(0),
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.max(0),
    "prod": lambda values: values.prod(0),
    "first": lambda values: values[0],
}


@runtime_checkable
class Importance(Protocol):
    needs_calibration_data: ClassVar[bool]
    kinds: ClassVar[tuple[str, ...]]  # of groups that it can score

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batches: Iterable[dict[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        """Of all groups of these kinds. The model comes back as it was, without gradients.

        `batches`: input_ids, position_ids and targets, Int64[B, T] each; targets are -100 where nothing is predicted.
        """
        ...


def check(importance: Importance, kinds: Sequence[str]) -> None:
    if odd := [kind for kind in kinds if kind not in importance.kinds]:
        raise Refusal(
            f"prune.kinds: {type(importance).__name__} scores {', '.join(importance.kinds)}, and not {odd[0]}; choose "
            f"another importance, or leave {odd[0]} out"
        )


def check_reduction(name: str) -> None:
    if name not in REDUCTIONS:
        raise Refusal(f"importance.reduction={name}: need one of {', '.join(REDUCTIONS)}")


def wanted(anatomy: Anatomy, kinds: Sequence[str]) -> list[Group]:
    return [group for group in anatomy.groups.values() if group.kind in kinds]


def per_unit(values: Tensor, axis: Axis, *, absolute_places: bool = False) -> np.ndarray:
    """Float64[units] of a parameter's values: the sum over all that a unit has of it.

    `absolute_places`: the sum of each place's row or column counts by its size, its sign left out.
    """
    if axis.slot is not None:
        values = values[axis.slot]
    dim = axis.dim if axis.slot is None else axis.dim - 1
    others = [other for other in range(values.ndim) if other != dim]
    along = values.sum(others, dtype=torch.float64) if others else values.double()
    if absolute_places:
        along = along.abs()
    found: np.ndarray = along.cpu().numpy()[axis.places].sum(1)
    return found


class Tally:
    """Per-unit values as they come, axis by axis, and what they make of a group."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups
        self.axes: dict[str, list[tuple[str, int, Axis]]] = {}
        for group in groups:
            for number, axis in enumerate(group.axes):
                self.axes.setdefault(axis.parameter, []).append((group.name, number, axis))
        self.values: dict[tuple[str, int], np.ndarray] = {}

    def add(self, parameter: str, values: Tensor, *, absolute_places: bool = False) -> None:
        for group, number, axis in self.axes.get(parameter, []):
            found = per_unit(values, axis, absolute_places=absolute_places)
            before = self.values.get((group, number))
            self.values[group, number] = found if before is None else before + found

    def scores(
        self, reduction: str = "sum", size: Callable[[np.ndarray], np.ndarray] = np.abs
    ) -> dict[str, np.ndarray]:
        made = {}
        for group in self.groups:
            of_axes = [self.values[group.name, n] for n in range(len(group.axes)) if (group.name, n) in self.values]
            if not of_axes:
                raise ValueError(f"{group.name}: nothing was told of any of its weights")
            made[group.name] = REDUCTIONS[reduction](size(np.stack(of_axes)))
        return made


def weights_of(model: Any, groups: Sequence[Group]) -> dict[str, Tensor]:
    """The parameters that the groups touch, biases and scales left out: they are of no matrix."""
    names = dict.fromkeys(axis.parameter for group in groups for axis in group.axes)
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names if parameters[name].ndim > 1}


def over_inputs(
    model: Any,
    groups: Sequence[Group],
    batches: Iterable[dict[str, Tensor]],
    take: Callable[[Group, Axis, Tensor], None],
) -> None:
    """For every batch and group `take(group, axis, read)`: what the matrix that the group's units feed reads, of the
    tokens that predict something, Float32[N, width], and the axis on which that matrix holds the units.

    Raises Refusal for experts, which read inside of one operation.
    """
    fed = {group.name: next(axis for axis in group.axes if axis.silences) for group in groups}
    if odd := [name for name, axis in fed.items() if axis.slot is not None]:
        raise Refusal(f"importance: what the experts of {odd[0]} read is not seen; use taylor or magnitude")
    real: list[Tensor] = []
    handles = []
    for group in groups:
        axis = fed[group.name]

        def hook(module: Any, inputs: tuple[Tensor, ...], group: Group = group, axis: Axis = axis) -> None:
            take(group, axis, inputs[0].flatten(0, -2)[real[0]].float())

        handles.append(model.get_submodule(axis.parameter.rpartition(".")[0]).register_forward_pre_hook(hook))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                real[:] = [(batch["targets"] >= 0).flatten()]
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def of_places(values: np.ndarray, axis: Axis) -> np.ndarray:
    """Float64[units] of Float64[width]: the sum over a unit's places."""
    found: np.ndarray = values[axis.places].sum(1)
    return found


def columns(model: Any, axis: Axis, power: int) -> np.ndarray:
    """Float64[width]: Σ |w|^power over all that a place of the axis is multiplied with."""
    weight = model.get_parameter(axis.parameter).detach()
    found: np.ndarray = (weight.abs().double() ** power).sum(1 - axis.dim).cpu().numpy()
    return found
