"""What is lost with a unit: the contract of conf/importance/*.yaml, and what the importances share.

Scores are Float64[units] for every group; of layers only where an importance knows them. A larger one is kept.

Calibration statistics are sums over batches, of units or of a matrix's inputs, never of weights. So they can be kept in
a file, continued, and added to those of other text, and a second copy of weights or gradients is never held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.pruning.groups import Anatomy, Axis, Group, shape_of
from models.sharding import gathered

REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sum": lambda values: values.sum(0),
    "mean": lambda values: values.mean(0),
    "max": lambda values: values.max(0),
    "prod": lambda values: values.prod(0),
    "first": lambda values: values[0],
}


Batch = dict[str, Tensor]  # input_ids, position_ids, targets: Int64[B, T] each; -100 where nothing is predicted
Statistics = dict[str, np.ndarray]  # Float64, added up over batches


@runtime_checkable
class Importance(Protocol):
    """The model comes back as it was, without gradients. Under ZeRO-3 every rank has to take part."""

    needs_calibration_data: ClassVar[bool]
    kinds: ClassVar[tuple[str, ...]]  # of groups that it can score

    def tally(self, model: Any, anatomy: Anatomy, kinds: Sequence[str], batch: Batch) -> Statistics:
        """Of one batch, this rank's part of it; only asked for where text is needed.

        Added up over the ranks, it is the same as if one process had read the whole batch.
        """
        ...

    def scores(
        self, model: Any, anatomy: Anatomy, kinds: Sequence[str], statistics: Statistics
    ) -> dict[str, np.ndarray]:
        """Of all groups of these kinds."""
        ...


def gather(
    importance: Importance,
    model: Any,
    anatomy: Anatomy,
    kinds: Sequence[str],
    batches: Iterable[Batch],
    before: Statistics | None = None,
    after: Callable[[Statistics], None] = lambda statistics: None,
) -> Statistics:
    """Over all ranks and batches, added to those gathered `before`; `after` is called with the sum after each batch."""
    total = dict(before or {})
    for batch in batches:
        for name, values in importance.tally(model, anatomy, kinds, batch).items():
            values = over_ranks(torch.from_numpy(values).to(batch["targets"].device)).cpu().numpy()
            total[name] = total[name] + values if name in total else values
        after(total)
    return total


def over_ranks(values: Tensor) -> Tensor:
    """Their sum, in place."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(values)
    return values


def check(importance: Importance, anatomy: Anatomy, kinds: Sequence[str]) -> None:
    """Raises Refusal for kinds of groups that it cannot score, of this model."""
    if "mlp" in kinds and anatomy.of("experts") and not getattr(importance, "sees_experts", True):
        raise Refusal(
            f"importance: {type(importance).__name__} cannot see the inputs of experts; use taylor or magnitude, or "
            f"leave mlp out of prune.kinds"
        )
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


def lines(values: Tensor, axis: Axis) -> Tensor:
    """Float64[width]: of each place on the axis the sum of all that lies there."""
    if axis.slot is not None:
        values = values[axis.slot]
    dim = axis.dim if axis.slot is None else axis.dim - 1
    others = [other for other in range(values.ndim) if other != dim]
    return values.sum(others, dtype=torch.float64) if others else values.double()


class Tally:
    """Per-unit values as they come, axis by axis, and what they make of a group.

    `absolute_places`: the sum of each place's row or column counts by its size, its sign left out.
    """

    def __init__(self, groups: Sequence[Group], absolute_places: bool = False) -> None:
        self.groups, self.absolute_places = groups, absolute_places
        self.axes: dict[str, list[tuple[str, Axis]]] = {}  # parameter → where its values belong
        for group in groups:
            for number, axis in enumerate(group.axes):
                self.axes.setdefault(axis.parameter, []).append((f"{group.name}/{number}", axis))
        self.values: Statistics = {}

    def dims(self, parameter: str) -> list[int]:
        """On which of them it holds units."""
        return sorted({axis.dim for _, axis in self.axes.get(parameter, [])})

    def add(self, parameter: str, values: Tensor) -> None:
        for key, axis in self.axes.get(parameter, []):
            self._put(key, axis, lines(values, axis))

    def add_lines(self, parameter: str, sums: Mapping[int, Tensor]) -> None:
        """As `add`, of a matrix whose `lines` on each of its `dims` are known."""
        for key, axis in self.axes.get(parameter, []):
            self._put(key, axis, sums[axis.dim])

    def _put(self, key: str, axis: Axis, along: Tensor) -> None:
        along = along.abs() if self.absolute_places else along
        found = along.cpu().numpy()[axis.places].sum(1)
        self.values[key] = self.values[key] + found if key in self.values else found

    def scores(self, reduction: str = "sum") -> dict[str, np.ndarray]:
        made = {}
        for group in self.groups:
            keys = [f"{group.name}/{number}" for number in range(len(group.axes))]
            of_axes = [self.values[key] for key in keys if key in self.values]
            if not of_axes:
                raise ValueError(f"{group.name}: none of its weights has a value")
            made[group.name] = REDUCTIONS[reduction](np.stack(of_axes))
        return made


def weights_of(model: Any, groups: Sequence[Group]) -> dict[str, nn.Parameter]:
    """The parameters that the groups touch, biases and scales left out: they are of no matrix."""
    names = dict.fromkeys(axis.parameter for group in groups for axis in group.axes)
    parameters = dict(model.named_parameters())
    return {name: parameters[name] for name in names if len(shape_of(parameters[name])) > 1}


def over_inputs(model: Any, groups: Sequence[Group], batch: Batch, take: Callable[[Group, Axis, Tensor], None]) -> None:
    """For every group `take(group, axis, inputs)`: the inputs, Float64[N, width], of the matrix that the group's units
    feed, of the tokens that predict something, and the axis on which that matrix holds the units.

    Raises Refusal for experts, whose inputs exist only inside of one operation.
    """
    fed = {group.name: fed_by(group) for group in groups}
    if odd := [name for name, axis in fed.items() if axis.slot is not None]:
        raise Refusal(f"importance: the inputs of the experts of {odd[0]} cannot be seen; use taylor or magnitude")
    hooks = []
    for group in groups:
        axis = fed[group.name]

        def hook(module: Any, inputs: tuple[Tensor, ...], group: Group = group, axis: Axis = axis) -> None:
            take(group, axis, real(inputs[0], batch).double())

        module = model.get_submodule(axis.parameter.rpartition(".")[0])
        hooks.append(partial(module.register_forward_pre_hook, hook))
    run(model, batch, hooks)


def run(model: Any, batch: Batch, hooks: Iterable[Callable[[], Any]], **words: Any) -> Any:
    """One forward, in eval mode and without a graph, with hooks that are removed again."""
    handles = [register() for register in hooks]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids, positions = batch["input_ids"], batch["position_ids"]
            return model(input_ids=ids, position_ids=positions, use_cache=False, **words)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def real(values: Tensor, batch: Batch) -> Tensor:
    """Of [B, T, width] or [B · T, width] the tokens that predict something."""
    return values.reshape(-1, values.shape[-1])[(batch["targets"] >= 0).flatten()]


def tokens_of(batch: Batch) -> np.ndarray:
    """Float64[1]: how many tokens predict something, to be added up beside what is averaged over them."""
    return np.array([float((batch["targets"] >= 0).sum())])


def fed_by(group: Group) -> Axis:
    """Where the group's units lie in the matrix that has them as inputs."""
    return next(axis for axis in group.axes if axis.silences)


def of_places(values: np.ndarray, axis: Axis) -> np.ndarray:
    """Float64[units] of Float64[width]: the sum over a unit's places."""
    found: np.ndarray = values[axis.places].sum(1)
    return found


def columns(model: Any, axis: Axis, power: int) -> np.ndarray:
    """Float64[width]: Σ |w|^power over all that a place of the axis is multiplied with."""
    weight = model.get_parameter(axis.parameter)
    with gathered([weight]):
        found: np.ndarray = (weight.detach().abs().double() ** power).sum(1 - axis.dim).cpu().numpy()
    return found
