"""The matrices of decoder layers: which modules hold one, how it lies there, and which of them a method takes.

Embeddings, norms, routers and the head are no part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from models.errors import Refusal
from models.representations import decoder_layers

# I inputs of a matrix, O outputs


def is_linear(module: nn.Module) -> bool:
    """Whether its `weight` is one matrix that it multiplies its input by."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether its matrix lies as [I, O]: GPT-2's Conv1D, where nn.Linear holds [O, I]."""
    return type(module).__name__ == "Conv1D"


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

    @property
    def place(self) -> str:
        """Its own name in its layer: self_attn.q_proj, mlp.experts.down_proj[3]."""
        return self.name if self.slot is None else f"{self.name}[{self.slot}]"

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
            if "router" in name.split("."):  # JetMoE's and Granite MoE's are an nn.Linear in a module of it
                continue
            if is_linear(module):
                found.append(Matrix(number, name, f"{at}.weight", is_transposed(module)))
            elif hasattr(module, "is_transposed"):
                for own, parameter in module.named_parameters(recurse=False):
                    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties it
                    slots = range(shape[0]) if len(shape) == 3 else ()
                    for slot in slots:
                        found.append(Matrix(number, f"{name}.{own}", f"{at}.{own}", module.is_transposed, slot))
    return found


_TOLD_SHARE = 0.01  # of a layer's parameters; below it they are a few vectors, as RWKV's factors of time


def of_no_kind(model: Any) -> str | None:
    """In words, the 3-D parameters of the layers that are none of `matrices`, or None where they are few: experts of
    families whose layout transformers does not declare. Kernels of convolutions are meant to be left."""
    layers, root = decoder_layers(model), name_of_layers(model)
    kernels = {id(p) for module in layers.modules() if isinstance(module, _ConvNd) for p in module.parameters()}
    known = {matrix.parameter for matrix in matrices(model)}
    sizes = {name: parameter.numel() for name, parameter in layers.named_parameters()}
    left = [
        name
        for name, parameter in layers.named_parameters()
        if parameter.dim() == 3 and id(parameter) not in kernels and f"{root}.{name}" not in known
    ]
    share = sum(sizes[name] for name in left) / max(1, sum(sizes.values()))
    if share < _TOLD_SHARE:
        return None
    kinds = list(dict.fromkeys(name.partition(".")[2] for name in left))
    named = ", ".join([*kinds[:3], *(["…"] if len(kinds) > 3 else [])])
    return (
        f"{len(left)} parameters with three dimensions ({named}) are left as they are, {share:.0%} of what the layers "
        f"hold: how they lie in {type(model).__name__} is not known"
    )


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


def check_modules(taken: Sequence[Matrix], method: str, other: str) -> None:
    """Raises Refusal for experts, whose inputs arise inside of one operation, where they cannot be changed; `other` is
    a way that leaves inputs as they are."""
    if experts := [matrix for matrix in taken if matrix.slot is not None]:
        names = dict.fromkeys(matrix.name for matrix in experts)
        raise Refusal(
            f"{method}: the inputs of {experts[0].parameter} cannot be rounded, as experts are one operation; use "
            f"{other}, or skip=[{','.join(names)}]"
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
