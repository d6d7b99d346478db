"""Which stretch of which trained parameter a rank holds in full precision, and the optimizer's state of it.

Without sharding a rank holds whole parameters. Under ZeRO 1 and 2 it holds a stretch of the flattened group that a
parameter is in, under ZeRO 3 a stretch of each parameter. Here all three are the same: pieces of flattened parameters,
by name, as views that may be read and written. So what one topology has saved, every other one can take up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Piece:
    """A stretch of a parameter, flattened."""

    name: str
    start: int
    values: Tensor  # [n] a view: the parameter's own, or under ZeRO those of its float32 master copy
    state: dict[str, Tensor]  # [n] each, views: what the optimizer holds of every element, e.g. moments
    numbers: dict[str, Tensor]  # what it holds of the parameter as a whole, e.g. its step
    borrowed: bool  # read from a disk: values and state are gone when the next piece is asked for


@dataclass(frozen=True)
class _Place:
    """Where a rank holds a parameter, or a stretch of it."""

    owner: Any  # the tensor that the optimizer steps
    start: int  # in the flattened parameter
    stretch: slice  # of the owner: what is the parameter's
    group: int = -1  # of ZeRO-3: the owner's number, by which it is brought in from a disk


def pieces(optimizer: Any, trained: Mapping[str, nn.Parameter], changed: bool = False) -> Iterator[Piece]:
    """What this rank holds. `optimizer`: torch's, or DeepSpeed's around it; `trained`: by name, in one order
    everywhere. `changed`: what is written to the pieces is kept where they are on a disk, too."""
    places = [(name, place) for name, parameter in trained.items() for place in _places(optimizer, parameter)]
    places.sort(key=lambda each: each[1].group)  # each owner is brought in once
    for group, of_group in groupby(places, key=lambda each: each[1].group):
        with _at_hand(optimizer, group, changed) as borrowed:
            for name, place in of_group:
                owner, stretch = place.owner, place.stretch
                held = _base(optimizer).state.get(owner, {})
                whole = {key: torch.as_tensor(value) for key, value in held.items()}
                of_elements = {key for key, value in whole.items() if value.shape == owner.shape and value.dim() > 0}
                yield Piece(
                    name,
                    place.start,
                    owner.data.view(-1)[stretch],
                    {key: whole[key].view(-1)[stretch] for key in sorted(of_elements)},
                    {key: value for key, value in sorted(whole.items()) if key not in of_elements},
                    borrowed,
                )


def make_room(
    optimizer: Any,
    trained: Mapping[str, nn.Parameter],
    state: Mapping[str, set[str]],
    numbers: Mapping[str, Mapping[str, Tensor]],
) -> None:
    """Give the optimizer the state that it makes at its first step: zeros for the elements, and the `numbers` of each
    parameter as they were saved. Both are by the parameter's name."""
    groups = _base(optimizer).param_groups
    on_device = any(group.get("capturable") or group.get("fused") for group in groups)  # else steps are in host memory
    made = set()  # a flattened group of ZeRO's owns many parameters
    for name, parameter in trained.items():
        for place in _places(optimizer, parameter):
            owner = place.owner
            if owner in made:
                continue
            made.add(owner)
            whole = numbers.get(name, {}).items()
            with _at_hand(optimizer, place.group, changed=True):
                _base(optimizer).state[owner] = {
                    **{key: value.to(owner.device) if on_device else value for key, value in whole},
                    **{key: torch.zeros_like(owner) for key in sorted(state.get(name, ()))},
                }


def refresh(optimizer: Any) -> None:
    """After pieces were written: make the weights that the model computes with from their master copies. Every rank
    must call it."""
    if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2, and DeepSpeed's optimizer for bf16
        optimizer.update_lp_params()
    elif hasattr(optimizer, "fp16_partitioned_groups_flat"):  # ZeRO 3, as DeepSpeed itself does after loading
        masters = optimizer.fp32_partitioned_groups_flat
        for group, (master, flat, parts) in enumerate(
            zip(masters, optimizer.fp16_partitioned_groups_flat, optimizer.fp16_partitioned_groups, strict=True)
        ):
            with _at_hand(optimizer, group):
                flat.data.copy_(master.data)
            for part, fresh in zip(parts, optimizer.unflatten(flat, parts), strict=True):
                part.data = fresh.data
        if optimizer.persistent_parameters:  # small ones, which every rank keeps whole
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()  # of ZeRO++, made of the weights there were before


def _base(optimizer: Any) -> Any:
    """torch's optimizer inside of DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def _at_hand(optimizer: Any, group: int, changed: bool = False) -> Iterator[bool]:
    """An owner of ZeRO-3's and its state in memory, and whether they were brought there from NVMe; `changed`: they are
    written back."""
    swapped = group >= 0 and optimizer._swappable_optimizer_subgroup(group)
    if not swapped:
        yield False
        return
    optimizer._optimizer_states_and_gradient_swap_in(group)
    try:
        yield True
    finally:
        if changed:
            optimizer._optimizer_states_and_gradient_swap_out(group)
        else:
            optimizer._release_swap_buffers(group)


def _places(optimizer: Any, parameter: Any) -> Iterator[_Place]:
    """Where this rank holds any of it."""
    if hasattr(parameter, "ds_id"):
        group, begin, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = padded * torch.distributed.get_rank(parameter.ds_process_group)
        if (numel := min(padded, parameter.ds_numel - start)) > 0:
            owner = optimizer.fp32_partitioned_groups_flat[group]
            yield _Place(owner, start, slice(begin, begin + numel), group)
    elif hasattr(parameter, "_hp_mapping"):
        if (held := parameter._hp_mapping) is not None:
            masters = (
                getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            )
            inside = held.hp_fragment_address
            stretch = slice(inside.start, inside.start + inside.numel)
            yield _Place(masters[held.param_group_index], held.lp_fragment_address.start, stretch)
    else:
        yield _Place(parameter, 0, slice(0, parameter.numel()))
