"""A model one decoder layer at a time: its matrices, and what each of them reads once the layers before it are changed.

For methods that change a layer's weights by what the layer reads. Embeddings, norms, routers and the head are no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.heads import body_of
from models.representations import decoder_layers

# B batch, T tokens, N tokens of a batch, I what a matrix reads, O what it gives


@dataclass(frozen=True)
class Matrix:
    """One matrix of a decoder layer: a linear module's weight, or one expert's slice of a 3-D parameter."""

    layer: int
    name: str  # in its layer: self_attn.q_proj, mlp.experts.down_proj
    parameter: str  # of the model that holds it
    transposed: bool = False  # it lies there as [I, O], as in GPT-2's Conv1D
    slot: int | None = None  # of a 3-D parameter

    def of(self, parameter: Tensor) -> Tensor:
        """The view [O, I]; writing to it writes to the parameter."""
        own = parameter if self.slot is None else parameter[self.slot]
        return own.T if self.transposed else own

    def __str__(self) -> str:
        return self.parameter if self.slot is None else f"{self.parameter}[{self.slot}]"


def matrices(model: Any) -> list[Matrix]:
    """All of them, layer by layer. Experts are known where transformers says how they lie (`is_transposed`)."""
    layers = decoder_layers(model)
    root = next(name for name, module in model.named_modules() if module is layers)
    found = []
    for number, layer in enumerate(layers):
        for name, module in layer.named_modules(remove_duplicate=False):
            at = f"{root}.{number}.{name}"
            if _is_linear(module):
                found.append(Matrix(number, name, f"{at}.weight", type(module).__name__ == "Conv1D"))
            elif hasattr(module, "is_transposed"):
                for own, parameter in module.named_parameters(recurse=False):
                    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties it
                    slots = range(shape[0]) if len(shape) == 3 else ()
                    for slot in slots:
                        found.append(Matrix(number, f"{name}.{own}", f"{at}.{own}", module.is_transposed, slot))
    return found


def chosen(model: Any, skip: Sequence[str], setting: str) -> list[Matrix]:
    """Those that `skip` does not name, by the end of their names. Raises Refusal for a name of none, for matrices
    that are also something else, and where none is left; `setting` is the config's name of `skip`."""
    found = matrices(model)

    def named(matrix: Matrix, name: str) -> bool:
        return f".{matrix.layer}.{matrix.name}".endswith(f".{name}")

    for name in skip:
        if not any(named(matrix, name) for matrix in found):
            kinds = dict.fromkeys(matrix.name for matrix in found)
            raise Refusal(f"{setting}: the layers have no matrix {name}; they have {', '.join(kinds)}")
    left = [matrix for matrix in found if not any(named(matrix, name) for name in skip)]
    if not left:
        raise Refusal(f"{setting}: no matrix is left; skip fewer")
    check_alone(model, left)
    return left


def check_read(taken: Sequence[Matrix], method: str, other: str) -> None:
    """Raises Refusal for experts, which read inside of one operation; `other` is a way that needs no text."""
    if experts := [matrix for matrix in taken if matrix.slot is not None]:
        names = dict.fromkeys(matrix.name for matrix in experts)
        raise Refusal(
            f"{method}: what {experts[0].parameter} reads is not seen, as experts are one operation; use {other}, or "
            f"skip=[{', '.join(names)}]"
        )


def check_alone(model: Any, found: Sequence[Matrix]) -> None:
    """Refuse a matrix that is also something else: another layer's, or the embeddings'."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    for matrix in found:
        known = names[id(model.get_parameter(matrix.parameter))]
        if len(known) > 1:
            other = next(name for name in known if name != matrix.parameter)
            raise Refusal(f"{matrix.parameter} is also {other}, and cannot be changed alone; skip=[{matrix.name}]")


class Reading(Protocol):
    def add(self, read_NI: Tensor) -> None:
        """What a matrix reads, of one more batch."""
        ...


R = TypeVar("R", bound=Reading)


@dataclass(frozen=True)
class Turn:
    """A layer whose turn it is, and what it is called with, batch by batch."""

    number: int
    layer: nn.Module
    hidden: Sequence[Tensor]  # [B, T, H] each
    words: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]

    def read(self, start: Callable[[int], R]) -> dict[str, R]:
        """What the layer's linear modules read, by their names in it, each in a `start(width)`.

        Modules that read the very same tensor (queries, keys and values) share one. What no batch reaches is missing.
        """
        gathered: dict[str, R] = {}
        seen: dict[int, tuple[Tensor, R]] = {}  # of this batch; the tensor is held, or its id could be another's

        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                tensor = inputs[0]
                if id(tensor) not in seen:
                    mine = gathered[name] if name in gathered else start(tensor.shape[-1])
                    mine.add(tensor.flatten(0, -2))
                    seen[id(tensor)] = (tensor, mine)
                gathered[name] = seen[id(tensor)][1]

            return hook

        linear = [(name, module) for name, module in self.layer.named_modules() if _is_linear(module)]
        handles = [module.register_forward_pre_hook(hook_of(name)) for name, module in linear]
        try:
            for hidden, words in zip(self.hidden, self.words, strict=True):
                seen.clear()
                _call(self.layer, hidden, words)
        finally:
            for handle in handles:
                handle.remove()
        return gathered


def in_turn(model: Any, batches: Sequence[Tensor]) -> Iterator[Turn]:
    """The layers, first to last. Whoever takes a turn may change the layer's weights: the next layer reads what the
    changed one gives.

    `batches`: Int64[B, T] each, without padding; none, and nothing is run. What each layer is called with beside the
    hidden states (masks, rotations) does not depend on weights: it is what the model itself says in one whole forward.
    Kept is the input of one layer for all batches.
    """
    layers = decoder_layers(model)
    hidden, words = [], []
    for ids in batches:
        first, of_layers = _calls(model, layers, ids)
        hidden.append(first)
        words.append(of_layers)
    for number, layer in enumerate(layers):
        mine = [of_layers[number] for of_layers in words]
        yield Turn(number, layer, hidden, mine)
        for at, said in enumerate(mine):
            hidden[at] = _call(layer, hidden[at], said)


@torch.no_grad()
def _calls(
    model: Any, layers: nn.ModuleList, ids: Tensor
) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
    """What the first layer reads, and what every layer is told beside that."""
    first: list[Tensor] = []
    told: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        said = dict(kwargs)
        hidden = args[0] if args else said.pop("hidden_states")
        if not first:
            first.append(hidden)
        told.append((args[1:], said))

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        body_of(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return first[0], told


@torch.no_grad()
def _call(layer: nn.Module, hidden: Tensor, words: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    given = layer(hidden, *words[0], **words[1])
    return given[0] if isinstance(given, tuple) else given


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
