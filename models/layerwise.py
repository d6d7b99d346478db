"""A model one decoder layer at a time: the inputs of each layer's matrices once the layers before it are changed.

For methods that change a layer's weights by the layer's inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.experts import are_experts, reads_of_experts
from models.heads import body_of
from models.matrices import is_linear, name_of_layers
from models.representations import decoder_layers
from models.whole import not_finite

# B batch, T tokens, N tokens of a batch, I inputs of a matrix, H hidden width


class Reading(Protocol):
    def add(self, read_NI: Tensor) -> None:
        """The inputs of a matrix, from one more batch."""
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
    routed: dict[str, int] = field(default_factory=dict)  # tokens sent to each expert's matrix, as `read` has seen

    def read(self, start: Callable[[int], R], experts: bool = True) -> dict[str, R]:
        """The inputs of the layer's matrices, by their places in it (Matrix.place), each in a `start(width)`.

        Modules that read the very same tensor (queries, keys and values) share one. Each expert has its own, of the
        tokens that are routed to it; not where `experts` is false. What no batch reaches is missing.
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

        def experts_hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, named: Any, output: Tensor) -> None:
                for own, expert, read_NI in reads_of_experts(module, inputs, named, output):
                    place = f"{name}.{own}[{expert}]"
                    self.routed[place] = self.routed.get(place, 0) + len(read_NI)
                    if len(read_NI):
                        if place not in gathered:
                            gathered[place] = start(read_NI.shape[-1])
                        gathered[place].add(read_NI)

            return hook

        self.routed.clear()
        modules = list(self.layer.named_modules())
        handles = [m.register_forward_pre_hook(hook_of(name)) for name, m in modules if is_linear(m)]
        for name, module in modules:
            if experts and are_experts(module):
                handles.append(module.register_forward_hook(experts_hook_of(name), with_kwargs=True))
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
        """Find out the first layer's input for a batch, and every layer's other arguments."""
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
            if read.is_floating_point() and (what := not_finite(read)):
                raise Refusal(f"{what} in {root}.{number}.{name}: the model's weights are damaged, copy it again")
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
