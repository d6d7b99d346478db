"""Scales that move from the operation that makes a tensor into the matrices that read it; the model stays the same.

A channel that is divided by s where it is made, and multiplied by weights that are s times as large, changes nothing
but how well those weights can be rounded (arXiv:2211.10438, 2306.00978). It is made by a norm's weight; by values, of
which attention's output is a sum; or by the linear half of a gated MLP. A forward shows which matrices read which norm.
Nothing is folded by names alone: each fold is tried with random scales on a copy of its layer, and is made only where
the layer's output stays the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from models.layerwise import Turn
from models.matrices import Matrix, is_linear
from models.pruning.groups import Anatomy, Group
from models.quantization.quantizer import Scales
from models.quantization.scheme import WeightScheme

# K channels of a fold, I inputs of a reader: a channel of values is read by all query heads that share it
# U units of a group, O outputs of a matrix

_SAME = 1e-3  # relative error of a fold that is none; in fp32 a true one leaves 1e-6


@dataclass(frozen=True)
class Fold:
    """One operation that makes a tensor, and the matrices that read it, by their names in the layer."""

    giver: Matrix | str  # or a norm
    rows_K: Tensor  # Int64[K]
    readers: tuple[Matrix, ...]
    channel_I: Tensor  # Int64[I]
    offset: float = 0.0  # what a norm adds to its weight

    @property
    def giver_name(self) -> str:
        return self.giver.name if isinstance(self.giver, Matrix) else self.giver

    @torch.no_grad()
    def apply(self, layer: nn.Module, scale_K: Tensor) -> None:
        module: Any = layer.get_submodule(self.giver_name)
        weight = self.giver.of(module.weight) if isinstance(self.giver, Matrix) else module.weight
        rows_K, by_K = self.rows_K.to(weight.device), scale_K.to(weight)
        by = by_K[:, None] if weight.ndim == 2 else by_K
        weight[rows_K] = (weight[rows_K] + self.offset) / by - self.offset
        if getattr(module, "bias", None) is not None:
            module.bias[rows_K] /= by_K
        for reader in self.readers:
            reader.of(_weight(layer, reader)).mul_(by_K[self.channel_I.to(weight.device)])


@torch.no_grad()
def fold(
    anatomy: Anatomy, turn: Turn, taken: Sequence[Matrix], read: Mapping[str, Any], scales: Scales, scheme: WeightScheme
) -> dict[str, Any]:
    """Scale one layer wherever it can be scaled. Returns the statistics of the scaled inputs. Only matrices that are
    `taken` are scaled."""
    found = dict(read)
    for each in folds(anatomy, turn, taken):
        readers = [
            (reader.of(_weight(turn.layer, reader)), found[reader.name])
            for reader in each.readers
            if reader.name in found
        ]
        if len(readers) < len(each.readers):
            continue
        scale_K = scales(readers, each.channel_I, scheme)
        each.apply(turn.layer, scale_K)
        scale_I = scale_K[each.channel_I.to(scale_K.device)]
        divided = {id(of): of.divided(scale_I) for _, of in readers}  # once, where they share it
        found |= {reader.name: divided[id(of)] for reader, (_, of) in zip(each.readers, readers, strict=True)}
    return found


def folds(anatomy: Anatomy, turn: Turn, taken: Sequence[Matrix]) -> list[Fold]:
    """The folds of one layer that leave its output the same, as the first batch shows."""
    layer = copy.deepcopy(turn.layer)
    parameters = {parameter.dtype for parameter in layer.parameters()}
    wide = torch.promote_types(torch.float32, parameters.pop())
    layer.to(wide)

    def widened(value: Any) -> Any:
        return value.to(wide) if isinstance(value, Tensor) and value.is_floating_point() else value

    hidden, words = tree_map(widened, (turn.hidden[0], turn.words[0]))
    given, plain = _run(layer, hidden, words)
    alone = {matrix.name: matrix for matrix in taken if matrix.slot is None}
    prefix = f"{anatomy.prefix}.{turn.number}."
    candidates = []
    for name, readers in given.read_of_norms.items():
        offset = anatomy.norms.get(f"{prefix}{name}.weight", 0.0) or 0.0
        if all(reader in alone for reader in readers):
            every = torch.arange(hidden.shape[-1])
            candidates.append(Fold(name, every, tuple(alone[reader] for reader in readers), every, offset))
    for kind, width in (("heads", anatomy.head_dim), ("mlp", 1)):
        group = anatomy.groups.get(f"layers.{turn.number}.{kind}")
        if group is not None and (between := _between(group, width, prefix, alone)):
            candidates.append(between)
    draw = torch.Generator().manual_seed(0)
    kept = []
    for each in candidates:
        scale_K = (2 * torch.rand(len(each.rows_K), generator=draw) - 1).exp2()
        each.apply(layer, scale_K)
        again, scaled = _run(layer, hidden, words)
        each.apply(layer, 1 / scale_K)
        same = [_same(again.outputs[r.name], given.outputs[r.name]) for r in each.readers if r.name in given.outputs]
        if all(same) and _same(scaled - hidden, plain - hidden):
            kept.append(each)
    return kept


def _between(group: Group, width: int, prefix: str, alone: Mapping[str, Matrix]) -> Fold | None:
    """From the last matrix that a group reads with to the one it writes with: `width` channels of each unit."""
    weights = [axis for axis in group.axes if axis.parameter.endswith(".weight")]
    source, output = weights[-2], weights[-1]  # values, after queries and keys; the linear half, after the gate
    names = [axis.parameter.removeprefix(prefix).removesuffix(".weight") for axis in (source, output)]
    if not all(name in alone for name in names):
        return None
    rows_K = torch.from_numpy(source.places[:, -width:].ravel().copy())
    columns_UW = torch.from_numpy(output.places)
    channel_UW = width * torch.arange(len(columns_UW))[:, None] + torch.arange(columns_UW.shape[1]) % width
    channel_I = torch.empty(columns_UW.numel(), dtype=torch.long)
    channel_I[columns_UW.ravel()] = channel_UW.ravel()
    return Fold(alone[names[0]], rows_K, (alone[names[1]],), channel_I)


@dataclass(frozen=True)
class _Given:
    outputs: dict[str, Tensor]  # of linear modules
    read_of_norms: dict[str, list[str]]  # the linear modules that read the very tensor that a norm gives


def _run(layer: nn.Module, hidden: Tensor, words: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[_Given, Tensor]:
    """The outputs of the layer's parts, and of the layer."""
    outputs: dict[str, Tensor] = {}
    norms: list[tuple[str, Tensor]] = []  # held, or an id could be another's
    readers: dict[str, list[str]] = {}

    def linear_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs[name] = output
            for norm, tensor in norms:
                if tensor is inputs[0]:
                    readers.setdefault(norm, []).append(name)

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: norms.append((name, output))

    handles = []
    for name, module in layer.named_modules():
        if is_linear(module):
            handles.append(module.register_forward_hook(linear_hook(name)))
        elif "norm" in type(module).__name__.lower() and getattr(module, "weight", None) is not None:
            handles.append(module.register_forward_hook(norm_hook(name)))
    try:
        given = layer(hidden, *words[0], **words[1])
    finally:
        for handle in handles:
            handle.remove()
    return _Given(outputs, readers), given[0] if isinstance(given, tuple) else given


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _SAME * wanted.norm())


def _weight(layer: nn.Module, matrix: Matrix) -> Tensor:
    weight = layer.get_submodule(matrix.name).weight
    assert isinstance(weight, Tensor)
    return weight
