"""A model one decoder layer at a time: its matrices, and what each of them reads once the layers before it are changed.

For methods that change a layer's weights by what the layer reads. Embeddings, norms, routers and the head are no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
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


def name_of_layers(model: Any) -> str:
    """model.layers, transformer.h: the layers are NAME.0 and so on."""
    layers = decoder_layers(model)
    return next(name for name, module in model.named_modules() if module is layers)


def matrices(model: Any) -> list[Matrix]:
    """All of them, layer by layer. Experts are known where transformers says how they lie (`is_transposed`)."""
    root = name_of_layers(model)
    found = []
    for number, layer in enumerate(decoder_layers(model)):
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
Words = tuple[tuple[Any, ...], dict[str, Any]]  # positional, and by name


@dataclass(frozen=True)
class Turn:
    """A layer whose turn it is, and what it is called with, batch by batch."""

    number: int
    layer: nn.Module
    hidden: Sequence[Tensor]  # [B, T, H] each
    words: Sequence[Words]

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


class Passage:
    """A text's way through a model, all of it through one layer after the other.

    `batches`: Int64[B, T] each, without padding; none, and nothing is run. `weights`: of layers that are on the meta
    device, by the model's names; a layer is there while it has its turn, and nothing is left of it afterwards. What
    each layer is called with beside the hidden states (masks, rotations) does not depend on weights: it is what the
    model itself says in a forward in which all layers but the first pass on what they are given. Kept is the input of
    one layer for all batches.
    """

    def __init__(self, model: Any, batches: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None) -> None:
        self._model, self._layers, self._batches, self._weights = model, decoder_layers(model), batches, weights
        self._hidden: list[Tensor] = []  # [B, T, H] each
        self._words: list[list[Words]] = []  # by batch, then by layer
        self._beside: tuple[Any, ...] | None = None  # what a layer gives with the hidden states; None: no tuple

    def turns(self) -> Generator[Turn, None, None]:
        """The layers, first to last. Whoever takes a turn may change the layer's weights: the next layer reads what
        the changed one gives."""
        for number, layer in enumerate(self._layers):
            with self._present(number):
                if number == 0:
                    for ids in self._batches:
                        self._begin(ids)
                mine = [words[number] for words in self._words]
                yield Turn(number, layer, self._hidden, mine)
                for at, words in enumerate(mine):
                    self._hidden[at] = _call(layer, self._hidden[at], words)

    @torch.no_grad()
    def last(self) -> list[Tensor]:
        """[B, T, H] each: what the head reads. Takes all the turns."""
        for _ in self.turns():
            pass
        found = []
        for ids, hidden in zip(self._batches, self._hidden, strict=True):
            given = self._given(hidden)
            with _forward(self._layers, lambda *_, given=given, **__: given):
                found.append(body_of(self._model)(input_ids=ids, use_cache=False).last_hidden_state)
        return found

    @torch.no_grad()
    def _begin(self, ids: Tensor) -> None:
        """Find out what the first layer reads of a batch, and what every layer is told beside that."""
        told: list[tuple[Tensor, Words]] = []
        first = self._layers[0].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            said = dict(kwargs)
            hidden = args[0] if args else said.pop("hidden_states")
            told.append((hidden, (args[1:], said)))
            if len(told) > 1:
                return self._given(hidden)
            given = first(*args, **kwargs)
            self._beside = given[1:] if isinstance(given, tuple) else None
            return given

        with _forward(self._layers, forward):
            body_of(self._model)(input_ids=ids, use_cache=False)
        self._hidden.append(told[0][0])
        self._words.append([words for _, words in told])

    def _given(self, hidden: Tensor) -> Any:
        """As this family's layers give it."""
        return hidden if self._beside is None else (hidden, *self._beside)

    @contextmanager
    def _present(self, number: int) -> Iterator[None]:
        layer, root = self._layers[number], name_of_layers(self._model)
        missing = {name: tensor for name, tensor in layer.named_parameters() if tensor.is_meta}
        device = next(tensor.device for tensor in self._model.parameters() if not tensor.is_meta)
        for name in missing:
            assert self._weights is not None
            read = self._weights[f"{root}.{number}.{name}"]
            _set(layer, name, read.to(device, copy=True))  # or it could stay a part of the file
        try:
            yield
        finally:
            for name, tensor in missing.items():
                _set(layer, name, tensor)


def in_turn(
    model: Any, batches: Sequence[Tensor], weights: Mapping[str, Tensor] | None = None
) -> Generator[Turn, None, None]:
    return Passage(model, batches, weights).turns()


@contextmanager
def _forward(layers: nn.ModuleList, forward: Callable[..., Any]) -> Iterator[None]:
    """In place of all the layers' own."""
    for layer in layers:
        layer.forward = forward
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _set(layer: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    layer.get_submodule(owner)._parameters[own] = nn.Parameter(tensor, requires_grad=False)


@torch.no_grad()
def _call(layer: nn.Module, hidden: Tensor, words: Words) -> Tensor:
    given = layer(hidden, *words[0], **words[1])
    return given[0] if isinstance(given, tuple) else given


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
