"""Scales that move from the operation that makes a tensor into the matrices that read it; the model stays the same.

A channel that is divided by s where it is made, and multiplied by weights that are s times as large, changes nothing
but how well those weights can be rounded (arXiv:2211.10438, 2306.00978). It is made by a norm's weight; by values, of
which attention's output is a sum; or by the linear half of a gated MLP, each expert's own among them. A forward shows
which matrices read which norm; of one that experts read, their router reads it too, and is scaled along.
Nothing is folded by names alone: each fold is tried with random scales on a copy of its layer, and is made only where
the layer's output stays the same.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from models.experts import LEAST_TOKENS, are_experts, first_of
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
    routers: tuple[str, ...] = ()  # modules that read it too, and are not quantized

    @property
    def giver_name(self) -> str:
        return self.giver.name if isinstance(self.giver, Matrix) else self.giver

    @torch.no_grad()
    def apply(self, layer: nn.Module, scale_K: Tensor) -> None:
        if isinstance(self.giver, Matrix):
            weight, bias = self.giver.of(_weight(layer, self.giver)), _bias(layer, self.giver)
        else:
            norm: Any = layer.get_submodule(self.giver)
            weight, bias = norm.weight, getattr(norm, "bias", None)
        rows_K, by_K = self.rows_K.to(weight.device), scale_K.to(weight)
        by = by_K[:, None] if weight.ndim == 2 else by_K
        weight[rows_K] = (weight[rows_K] + self.offset) / by - self.offset
        if bias is not None:
            bias[rows_K] /= by_K
        by_I = by_K[self.channel_I.to(weight.device)]
        for reader in self.readers:
            reader.of(_weight(layer, reader)).mul_(by_I)
        for router in self.routers:
            layer.get_parameter(f"{router}.weight").mul_(by_I)


@torch.no_grad()
def fold(
    anatomy: Anatomy, turn: Turn, taken: Sequence[Matrix], read: Mapping[str, Any], scales: Scales, scheme: WeightScheme
) -> dict[str, Any]:
    """Scale one layer wherever it can be scaled. Returns the statistics of the scaled inputs. Only matrices that are
    `taken` are scaled; an expert that too few tokens reach has no say in a scale that it shares."""
    found = dict(read)
    few = {place for place, tokens in turn.routed.items() if tokens < LEAST_TOKENS}
    for each in folds(anatomy, turn, taken):
        known = [reader for reader in each.readers if reader.place in found]
        asked = [reader for reader in known if reader.place not in few]
        if not asked or any(reader.slot is None and reader.place not in found for reader in each.readers):
            continue
        readers = [(reader.of(_weight(turn.layer, reader)), found[reader.place]) for reader in asked]
        scale_K = scales(readers, each.channel_I, scheme)
        each.apply(turn.layer, scale_K)
        scale_I = scale_K[each.channel_I.to(scale_K.device)]
        of_known = {id(found[reader.place]): found[reader.place] for reader in known}  # once, where they share it
        divided = {at: of.divided(scale_I) for at, of in of_known.items()}
        found |= {reader.place: divided[id(found[reader.place])] for reader in known}
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
    alone = {matrix.place: matrix for matrix in taken}
    prefix = f"{anatomy.prefix}.{turn.number}."
    candidates = [*_of_norms(anatomy, given, prefix, alone, hidden.shape[-1])]
    for kind, width in (("heads", anatomy.head_dim), ("mlp", 1)):
        group = anatomy.groups.get(f"layers.{turn.number}.{kind}")
        if group is not None and (between := _between(group, width, prefix, alone)):
            candidates.append([between])
    if of_experts := _inside_experts(anatomy, turn.number, prefix, alone):
        candidates.append(of_experts)
    kept: list[Fold] = []
    draw = torch.Generator().manual_seed(0)
    for alike in candidates:
        tried = [(each, (2 * torch.rand(len(each.rows_K), generator=draw) - 1).exp2()) for each in alike]
        for each, scale_K in tried:
            each.apply(layer, scale_K)
        again, scaled = _run(layer, hidden, words)
        for each, scale_K in tried:
            each.apply(layer, 1 / scale_K)
        read = {reader.name for each in alike for reader in each.readers if reader.name in given.outputs}
        if all(_same(again.outputs[name], given.outputs[name]) for name in read) and _same(
            scaled - hidden, plain - hidden
        ):
            kept += alike
    return kept


def _of_norms(
    anatomy: Anatomy, given: _Given, prefix: str, alone: Mapping[str, Matrix], width: int
) -> Iterator[list[Fold]]:
    every = torch.arange(width)
    for name, found in given.readers_of_norms.items():
        offset = anatomy.norms.get(f"{prefix}{name}.weight", 0.0) or 0.0
        experts = [matrix for matrix in alone.values() if matrix.slot is not None and matrix.name in found.experts]
        readers = tuple(alone[reader] for reader in found.linear if reader in alone)
        if len(readers) == len(found.linear) and {matrix.name for matrix in experts} == set(found.experts):
            yield [Fold(name, every, (*readers, *experts), every, offset, tuple(found.routers))]


def _inside_experts(anatomy: Anatomy, layer: int, prefix: str, alone: Mapping[str, Matrix]) -> list[Fold]:
    """From the linear half of each expert to the matrix that it writes with."""
    found = []
    for name, group in anatomy.groups.items():
        if not re.fullmatch(rf"layers\.{layer}\.experts\.\d+\.mlp", name):
            continue
        source, output = group.axes
        places = [f"{axis.parameter.removeprefix(prefix)}[{axis.slot}]" for axis in (source, output)]
        if all(place in alone for place in places):
            rows_K = torch.from_numpy(source.places[:, -1].copy())
            found.append(Fold(alone[places[0]], rows_K, (alone[places[1]],), torch.arange(len(rows_K))))
    return found


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


@dataclass
class _Readers:
    """What reads the tensor that a norm gives."""

    linear: list[str] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)  # their first parameter
    routers: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Given:
    outputs: dict[str, Tensor]  # of linear modules
    readers_of_norms: dict[str, _Readers]


def _run(layer: nn.Module, hidden: Tensor, words: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[_Given, Tensor]:
    """The outputs of the layer's parts, and of the layer. A linear module reads a norm where it is given its very
    tensor; beside experts, which are given another view of it, where it is given its memory."""
    outputs: dict[str, Tensor] = {}
    norms: list[tuple[str, Tensor]] = []  # held, or an id could be another's
    exact: dict[str, _Readers] = {}
    wide: dict[str, _Readers] = {}  # of views, too

    def hook_of(name: str, kind: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if kind == "linear":
                outputs[name] = output
            for norm, tensor in norms:
                if tensor is inputs[0]:
                    getattr(exact.setdefault(norm, _Readers()), kind).append(name)
                if (tensor.data_ptr(), tensor.numel()) == (inputs[0].data_ptr(), inputs[0].numel()):
                    getattr(wide.setdefault(norm, _Readers()), kind).append(name)

        return hook

    def norm_hook(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: norms.append((name, output))

    handles = []
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if is_linear(module):
            handles.append(module.register_forward_hook(hook_of(name, "linear")))
        elif are_experts(module):
            handles.append(module.register_forward_hook(hook_of(f"{name}.{first_of(module)}", "experts")))
        elif "norm" in type(module).__name__.lower() and weight is not None:
            handles.append(module.register_forward_hook(norm_hook(name)))
        elif isinstance(weight, Tensor) and weight.ndim == 2:
            handles.append(module.register_forward_hook(hook_of(name, "routers")))
    try:
        given = layer(hidden, *words[0], **words[1])
    finally:
        for handle in handles:
            handle.remove()
    readers = {}
    for norm in wide:
        if wide[norm].experts:
            readers[norm] = wide[norm]
        elif norm in exact and exact[norm].linear:
            readers[norm] = exact[norm]
    return _Given(outputs, readers), given[0] if isinstance(given, tuple) else given


def _same(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= _SAME * wanted.norm())


def _weight(layer: nn.Module, matrix: Matrix) -> Tensor:
    return layer.get_parameter(matrix.name if matrix.slot is not None else f"{matrix.name}.weight")


def _bias(layer: nn.Module, matrix: Matrix) -> Tensor | None:
    if matrix.slot is None:
        bias: Tensor | None = getattr(layer.get_submodule(matrix.name), "bias", None)
        return bias
    at, _, own = matrix.name.rpartition(".")
    biases = getattr(layer.get_submodule(at), f"{own}_bias", None)
    return None if biases is None else biases[matrix.slot]
