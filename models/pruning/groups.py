"""Which weights have to be removed together: the dependency groups of a causal LM.

A unit is the least that can be removed alone: a channel of an MLP, a KV head with its query heads, an expert, a channel
of the residual stream, a layer. A group is a set of units of one kind, with every axis of every parameter on which a
unit has places. Removing units is then nothing but leaving those places out (models/pruning/surgery.py).

LLM-Pruner (arXiv:2305.11627) finds such groups by walking a graph from neuron to neuron. Here a layer is taken apart by
the names that families give its parts, and whatever is left over is refused: pruning a part that was not understood
would be wrong. That the parts are what their names say is shown by every pruned model's certificate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from models.errors import Refusal
from models.heads import body_of
from models.matrices import is_transposed
from models.representations import decoder_layers

KINDS = ("heads", "mlp", "experts", "hidden", "layers")


@dataclass(frozen=True, eq=False)
class Axis:
    """Where units lie on one dimension of one parameter: Int64[U, W], unit → its W places.

    `silences`: with these places zero a unit has no effect any more, whatever its other weights are. `slot`: of a
    parameter that holds several matrices one behind another, the number of the one that is meant.
    """

    parameter: str
    dim: int
    places: np.ndarray
    silences: bool = False
    slot: int | None = None


@dataclass(frozen=True, eq=False)
class Group:
    name: str
    kind: str  # of KINDS
    layer: int | None  # None: of the whole model
    units: int
    axes: tuple[Axis, ...]


@dataclass(frozen=True)
class Anatomy:
    """All groups of a model, by name, in the order of the layers; and what else pruning has to know."""

    groups: dict[str, Group]
    layers: int
    prefix: str  # of the layers' names: PREFIX.NUMBER.…
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    aliases: dict[str, str]  # a tied parameter's further names → the one that the axes use
    norms: dict[str, float | None]  # scale of a norm of the stream → what is added to it; None: it takes means off
    scaled_tables: tuple[str, ...]  # embeddings that are multiplied by the root of the hidden size
    final_norm: str

    def of(self, kind: str) -> list[Group]:
        return [group for group in self.groups.values() if group.kind == kind]


def anatomy_of(model: Any) -> Anatomy:
    """Of a model on any device, meta included. Raises Refusal, naming the module that is not understood."""
    text = model.config.get_text_config()
    if not getattr(text, "num_attention_heads", None):
        raise Refusal(f"{type(model).__name__}: its config names no attention heads; this family cannot be pruned")
    hidden, heads = text.hidden_size, text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    names = {id(module): name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    prefix = names[id(layers)]
    found = _Found(model, hidden, heads, kv_heads, head_dim)
    for number, layer in enumerate(layers):
        found.layer(number, layer, f"{prefix}.{number}")
    found.outside(body_of(model), names[id(body_of(model))], prefix)
    found.finish()
    groups = [*found.groups, Group("hidden", "hidden", None, hidden, tuple(found.stream))]
    groups.append(Group("layers", "layers", None, len(layers), ()))
    named = model.named_parameters(remove_duplicate=False)
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    return Anatomy(
        {group.name: group for group in groups},
        len(layers),
        prefix,
        hidden,
        heads,
        kv_heads,
        head_dim,
        {name: first[id(parameter)] for name, parameter in named if first[id(parameter)] != name},
        found.norms,
        tuple(found.scaled),
        next((name for name in reversed(found.norms) if not name.startswith(f"{prefix}.")), ""),
    )


class _Found:
    """What has been understood so far; every parameter of the model has to be, once."""

    def __init__(self, model: Any, hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
        self.model = model
        self.hidden, self.heads, self.kv_heads, self.head_dim = hidden, heads, kv_heads, head_dim
        # A tied table has one name here, and one group of axes.
        self.shapes = {name: tuple(shape_of(parameter)) for name, parameter in model.named_parameters()}
        self.left = dict.fromkeys(self.shapes)
        self.groups: list[Group] = []
        self.stream: list[Axis] = []  # axes of the residual stream
        self.norms: dict[str, float | None] = {}
        self.scaled: list[str] = []
        self.whole = np.arange(hidden)[:, None]

    # A layer

    def layer(self, number: int, layer: nn.Module, name: str) -> None:
        attentions: list[str] = []
        mlps = 0
        for at, module in layer.named_modules(prefix=name):
            children = dict(module.named_children())
            if attention := _attention(children):
                self._attention(number, at, children, *attention)
                attentions.append(f"{at}.")
            if pair := _mlp(children):
                self._mlp(number, at, children, *pair)
                mlps += 1
            if isinstance(getattr(module, "gate_up_proj", None), nn.Parameter):
                self._experts(number, at)
                mlps += 1
        for at, module in layer.named_modules(prefix=name):
            self._norm(at, module, of_heads=at.startswith(tuple(attentions)))
        if (len(attentions), mlps) != (1, 1):
            raise Refusal(
                f"{name} ({type(layer).__name__}): {len(attentions)} attentions and {mlps} MLPs were recognized in it, "
                f"and one of each is needed; this family cannot be pruned"
            )

    def _attention(
        self, number: int, at: str, children: dict[str, nn.Module], inputs: Sequence[str], output: str, layout: str
    ) -> None:
        d, kv = self.head_dim, self.kv_heads
        together = self.heads // kv  # query heads of one KV head
        queries = _blocks(kv, together * d)
        keys = _blocks(kv, d)
        if layout == "separate":
            places = dict(zip(inputs, (queries, keys, keys), strict=True))
        elif layout == "side by side":
            first = self.heads * d
            places = {inputs[0]: np.concatenate([queries, first + keys, first + kv * d + keys], axis=1)}
        else:  # head by head: the queries, keys and values of a head stand together
            places = {inputs[0]: _blocks(kv, 3 * d)}
        axes = []
        for name, where in places.items():
            axes += self._linear(f"{at}.{name}", children[name], out=where, into=self.whole)
        axes += self._linear(f"{at}.{output}", children[output], out=self.whole, into=queries, silent=True)
        self.groups.append(Group(f"layers.{number}.heads", "heads", number, kv, tuple(axes)))

    def _mlp(self, number: int, at: str, children: dict[str, nn.Module], inputs: Sequence[str], output: str) -> None:
        width = _in_out(children[output])[0]
        one = np.arange(width)[:, None]
        both = np.concatenate([one, width + one], axis=1)  # gate and up, side by side
        axes = []
        for name in inputs:
            where = both if name == "gate_up_proj" else one
            axes += self._linear(f"{at}.{name}", children[name], out=where, into=self.whole)
        axes += self._linear(f"{at}.{output}", children[output], out=self.whole, into=one, silent=True)
        self.groups.append(Group(f"layers.{number}.mlp", "mlp", number, width, tuple(axes)))

    def _experts(self, number: int, at: str) -> None:
        """Matrices of all experts one behind another, and the router beside them."""
        up, down = f"{at}.gate_up_proj", f"{at}.down_proj"
        count, hidden, width = self.shapes[down]
        router = f"{at.rpartition('.')[0]}.gate.weight"
        if self.shapes[up] != (count, 2 * width, hidden) or self.shapes.get(router) != (count, hidden):
            raise Refusal(f"{at}: experts and router are not laid out as in Mixtral; this family cannot be pruned")
        for name in (up, down, router):
            self._claim(name)
        self.stream += [Axis(up, 2, self.whole), Axis(down, 1, self.whole, silences=True), Axis(router, 1, self.whole)]
        one = np.arange(width)[:, None]
        both = np.concatenate([one, width + one], axis=1)
        for expert in range(count):
            pair = (Axis(up, 1, both, slot=expert), Axis(down, 2, one, silences=True, slot=expert))
            self.groups.append(Group(f"layers.{number}.experts.{expert}.mlp", "mlp", number, width, pair))
        each = np.arange(count)[:, None]
        axes = (Axis(up, 0, each), Axis(down, 0, each), Axis(router, 0, each))
        self.groups.append(Group(f"layers.{number}.experts", "experts", number, count, axes))

    def _norm(self, at: str, module: nn.Module, of_heads: bool = False) -> None:
        """A scale of the stream's width belongs to it; one of a head's width (q_norm) to no unit. What scales all heads
        together ties them to each other, and is left for `finish` to refuse."""
        own = [f"{at}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if not own and not of_heads and "norm" in type(module).__name__.lower() and not list(module.children()):
            self.norms[at] = None  # no scale could take the difference
        if not own or not set(own) <= set(self.left) or "norm" not in type(module).__name__.lower():
            return
        for name in own:
            if self.shapes[name] == (self.hidden,) and not of_heads:
                self._claim(name)
                self.stream.append(Axis(name, 0, self.whole))
                rms = "RMSNorm" in type(module).__name__
                if name.endswith("weight") or not rms:
                    self.norms[name] = (1.0 if "Gemma" in type(module).__name__ else 0.0) if rms else None
            elif self.shapes[name] == (self.head_dim,) and of_heads:
                self._claim(name)

    # Outside of the layers

    def outside(self, body: nn.Module, name: str, layers: str) -> None:
        for at, module in body.named_modules(prefix=name):
            if at == layers or at.startswith(f"{layers}."):
                continue
            if isinstance(module, nn.Embedding) and self.shapes[f"{at}.weight"][1] == self.hidden:
                self._claim(f"{at}.weight")
                self.stream.append(Axis(f"{at}.weight", 1, self.whole, silences=True))
                if hasattr(module, "embed_scale"):
                    self.scaled.append(f"{at}.weight")
            self._norm(at, module)
        head = self.model.get_output_embeddings()
        names = [at for at, module in self.model.named_modules() if module is head]
        for name in names:
            if f"{name}.weight" in self.left:
                self._linear(name, head, out=None, into=self.whole)

    def finish(self) -> None:
        if self.left:
            name = next(iter(self.left))
            module = self.model.get_submodule(name.rpartition(".")[0])
            raise Refusal(
                f"{name} {list(self.shapes[name])} of {type(module).__name__} is not understood, so pruning could be "
                f"wrong; this family cannot be pruned"
            )

    # Parts

    def _linear(
        self,
        name: str,
        module: nn.Module,
        *,
        out: np.ndarray | None,
        into: np.ndarray,
        silent: bool = False,
    ) -> list[Axis]:
        """The axes of the group's own units; those of the residual stream are added to `stream`.

        A `silent` matrix writes to the stream; any other has the stream as its input.
        """
        weight, bias = f"{name}.weight", f"{name}.bias"
        rows, columns = (1, 0) if is_transposed(module) else (0, 1)
        expected = (_in_out(module)[1], _in_out(module)[0]) if rows == 0 else _in_out(module)
        covered = (out is None or out.size == expected[rows]) and into.size == expected[columns]
        if self.shapes.get(weight) != expected or not covered:
            raise Refusal(
                f"{name} {list(self.shapes.get(weight, ()))}: its widths are not those that the config's heads and "
                f"widths make; this family cannot be pruned"
            )
        self._claim(weight)
        has_bias = bias in self.left
        if has_bias:
            self._claim(bias)
        if silent:
            assert out is not None
            self.stream.append(Axis(weight, rows, out, silences=True))
            if has_bias:
                self.stream.append(Axis(bias, 0, out, silences=True))
            return [Axis(weight, columns, into, silences=True)]
        self.stream.append(Axis(weight, columns, into))
        if out is None:
            return []
        return [Axis(weight, rows, out), *([Axis(bias, 0, out)] if has_bias else [])]

    def _claim(self, name: str) -> None:
        if name not in self.left:
            raise Refusal(f"{name} belongs to two groups at once; this family cannot be pruned")
        del self.left[name]


_ATTENTIONS = (
    (("q_proj", "k_proj", "v_proj"), ("o_proj", "out_proj", "dense"), "separate"),
    (("qkv_proj",), ("o_proj",), "side by side"),
    (("c_attn",), ("c_proj",), "side by side"),
    (("query_key_value",), ("dense",), "head by head"),
)
_MLPS = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("c_fc",), "c_proj"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("up_proj",), "down_proj"),
    (("fc1",), "fc2"),
)


def _attention(children: Iterable[str]) -> tuple[Sequence[str], str, str] | None:
    there = set(children)
    for inputs, outputs, layout in _ATTENTIONS:
        if there.issuperset(inputs) and (output := [name for name in outputs if name in there]):
            return inputs, output[0], layout
    return None


def _mlp(children: Iterable[str]) -> tuple[Sequence[str], str] | None:
    there = set(children)
    return next(((inputs, output) for inputs, output in _MLPS if there.issuperset((*inputs, output))), None)


def _blocks(count: int, width: int) -> np.ndarray:
    return np.arange(count * width).reshape(count, width)


def shape_of(parameter: Any) -> Sequence[int]:
    """Under ZeRO-3 a parameter is empty, and remembers its shape."""
    shape: Sequence[int] = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def _in_out(module: Any) -> tuple[int, int]:
    if is_transposed(module):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)
