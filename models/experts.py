"""What each expert of a mixture reads: the tokens that the router sends to it.

transformers holds the experts of a layer as 3-D parameters of one module, whose forward is one operation. It is called
with all tokens and the router's choice, from which the inputs of every expert follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.matrices import Matrix

# N tokens, K experts of a token, I inputs of a matrix, O outputs

# Statistics of fewer tokens say less of an expert's inputs than they cost: one that so few are sent to is treated as
# without calibration text.
LEAST_TOKENS = 32


def are_experts(module: nn.Module) -> bool:
    """Whether its 3-D parameters are experts, as transformers declares them (`use_experts_implementation`)."""
    return hasattr(module, "is_transposed")


def check_experts_read(model: Any, taken: Sequence[Matrix], method: str, other: str) -> None:
    """Raises Refusal for experts that are laid out otherwise than here; `other` is a way that needs no text."""
    for matrix in taken:
        if matrix.slot is None:
            continue
        at, _, own = matrix.parameter.rpartition(".")
        if own not in _names(model.get_submodule(at)):
            raise Refusal(
                f"{method}: what the experts of {matrix.parameter} read is not known of this family; use {other}, or "
                f"skip=[{matrix.name}]"
            )


def reads_of_experts(
    module: Any, words: tuple[Any, ...], named: dict[str, Any], output: Tensor
) -> Iterator[tuple[str, int, Tensor]]:
    """(name of the parameter, number of the expert, its inputs Float[N, I]) of one forward, expert by expert; N is
    0 where no token was sent to it. What follows is computed again from these inputs, and has to be the module's
    `output`: raises Refusal where it is not, as these would then not be what its experts read."""
    bound = inspect.signature(type(module).forward).bind(module, *words, **named)
    hidden, chosen_NK, share_NK = list(bound.arguments.values())[1:4]
    hidden_NI = hidden.flatten(0, -2)
    first, second = _names(module)
    made_NO = torch.zeros_like(hidden_NI)
    for expert in range(len(getattr(module, second))):
        token_N, place_N = torch.where(chosen_NK == expert)
        read_NI = hidden_NI[token_N]
        yield first, expert, read_NI
        up_NO = _product(module, first, expert, read_NI)
        between_NI = module._apply_gate(up_NO) if _has_gate(module) else module.act_fn(up_NO)
        yield second, expert, between_NI
        given_NO = _product(module, second, expert, between_NI) * share_NK[token_N, place_N, None]
        made_NO.index_add_(0, token_N, given_NO.to(made_NO))
    apart = (made_NO - output.flatten(0, -2)).float().norm()
    rounding = 1e-3 if hidden.dtype in (torch.float32, torch.float64) else 0.05
    if not bool(apart <= rounding * output.float().norm()):
        raise Refusal(
            f"{type(module).__name__}: what its experts read is not known, as their outputs are not the sum of the "
            f"chosen experts'; skip=[{first},{second}]"
        )


def first_of(module: nn.Module) -> str:
    """The parameter that multiplies what the experts are given."""
    return "gate_up_proj" if _has_gate(module) else "up_proj"


def _names(module: nn.Module) -> tuple[str, str]:
    return first_of(module), "down_proj"


def _has_gate(module: nn.Module) -> bool:
    return bool(getattr(module, "has_gate", True))


def _product(module: Any, name: str, expert: int, read_NI: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    made_NO = read_NI @ (weight if module.is_transposed else weight.T)
    return made_NO + getattr(module, f"{name}_bias")[expert] if getattr(module, "has_bias", False) else made_NO
