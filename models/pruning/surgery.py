"""Units out of a model: the pruned one, whose matrices are smaller, and the masked one, which it has to equal.

Masking is by weights alone: with the places zero that a group's `silences` axes name, what flows out of a removed unit
is zero, whatever it is made of. An expert is silenced at its router: no weight of its own keeps it from being chosen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PretrainedConfig

from models.errors import Refusal
from models.load import empty_model
from models.pruning.groups import Anatomy, Axis
from models.sharding import gathered
from models.student import rebuilt

Kept = Mapping[str, np.ndarray]  # group → Int64[n], its remaining units, rising; a group that is absent keeps all

_WIDTHS = {"mlp": ("intermediate_size", "ffn_dim", "n_inner"), "experts": ("num_local_experts", "num_experts")}


def pruned_state(state: Mapping[str, Tensor], anatomy: Anatomy, kept: Kept) -> dict[str, Tensor]:
    """The weights of what remains, under the names they have in the smaller model.

    A tied table, of which `state` holds two names, comes out under both. Raises Refusal for channels of a stream whose
    norms take the mean off: that of fewer channels is another one.
    """
    if "hidden" in kept and (odd := [name for name, offset in anatomy.norms.items() if offset is None]):
        raise Refusal(
            f"hidden: {odd[0]} belongs to a LayerNorm, which takes off the mean over all channels, or is a norm "
            f"without scale; a pruned model could not equal the masked one. Prune heads, mlp or layers of this family"
        )
    slots: dict[str, list[tuple[Axis, np.ndarray]]] = {}
    whole: dict[str, list[tuple[Axis, np.ndarray]]] = {}
    for name, units in kept.items():
        for axis in anatomy.groups[name].axes:
            where = np.sort(axis.places[units].ravel())
            (whole if axis.slot is None else slots).setdefault(axis.parameter, []).append((axis, where))
    layers = kept.get("layers")
    made = {}
    for name, tensor in state.items():
        own = anatomy.aliases.get(name, name)
        placed = _placed(name, anatomy.prefix, layers)
        if placed is None:
            continue
        selected = whole.get(own, [])
        if name in slots:
            experts = next((where for axis, where in selected if axis.dim == 0), np.arange(len(tensor)))
            selected = [(axis, where) for axis, where in selected if axis.dim != 0]
            tensor = _each_slot(tensor, experts, slots[name])
        for axis, where in selected:
            tensor = tensor.index_select(axis.dim, torch.from_numpy(where).to(tensor.device))
        made[placed] = tensor.clone()
    if len(kept.get("hidden", ())) not in (0, anatomy.hidden):
        _fold_norms(made, anatomy, anatomy.hidden / len(kept["hidden"]))
    for alias, name in anatomy.aliases.items():  # one tensor under both names, so that it is saved once
        made[alias] = made[name]
    return made


@torch.no_grad()
def silence(model: Any, anatomy: Anatomy, kept: Kept) -> None:
    """Zeros, in place, in all weights by which a removed unit has an effect; under ZeRO-3 every rank takes part."""
    for name, units in kept.items():
        group = anatomy.groups[name]
        removed = np.setdiff1d(np.arange(group.units), units)
        for axis in group.axes:
            if axis.silences and len(removed):
                _silence(model, axis, axis.places[removed])
    gone = set(range(anatomy.layers)) - set(kept["layers"].tolist() if "layers" in kept else range(anatomy.layers))
    for axis in anatomy.groups["hidden"].axes:
        found = re.match(re.escape(anatomy.prefix) + r"\.(\d+)\.", axis.parameter)
        if axis.silences and found and int(found[1]) in gone:
            _silence(model, axis, axis.places)


def _silence(model: Any, axis: Axis, places: np.ndarray) -> None:
    parameter = model.get_parameter(axis.parameter)
    with gathered([parameter], changed=True):
        tensor = parameter.data if axis.slot is None else parameter.data[axis.slot]
        dim = axis.dim if axis.slot is None else axis.dim - 1
        tensor.index_fill_(dim, torch.from_numpy(places.ravel()).to(tensor.device), 0)


@contextmanager
def silent_experts(model: Any, anatomy: Anatomy, kept: Kept) -> Iterator[None]:
    """While it lasts, the routers of `model` never choose an expert that is removed."""
    gone: dict[int, Tensor] = {}
    for group in anatomy.of("experts"):
        if group.name in kept:
            removed = np.setdiff1d(np.arange(group.units), kept[group.name])
            gone[id(model.get_parameter(group.axes[-1].parameter))] = torch.from_numpy(removed)

    class Routers(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            if function is torch.nn.functional.linear and id(args[1]) in gone:
                out = out.index_fill(-1, gone[id(args[1])].to(out.device), -torch.inf)
            return out

    with Routers():
        yield


# The smaller model's config


def smaller_config(config: PretrainedConfig, anatomy: Anatomy, kept: Kept) -> tuple[PretrainedConfig, str]:
    """A config that gives exactly the widths that remain, and a note on what had to be done for it, or "".

    Raises Refusal where layers differ, or where no config can express it.
    """
    text = config.get_text_config()
    if text is not config:
        raise Refusal(f"{type(config).__name__} joins several models; give the text model alone, as a folder")
    values = config.to_dict()
    of_kind = {kind: _uniform(kind, anatomy, kept) for kind in ("heads", "mlp", "experts")}
    if of_kind["heads"] is not None:
        per_kv = anatomy.heads // anatomy.kv_heads
        values |= {config.attribute_map.get("num_attention_heads", "num_attention_heads"): per_kv * of_kind["heads"]}
        if getattr(config, "num_key_value_heads", None) is not None:
            values["num_key_value_heads"] = of_kind["heads"]
    for kind, names in _WIDTHS.items():
        if of_kind[kind] is not None:
            moe = kind == "mlp" and "moe_intermediate_size" in values and bool(anatomy.of("experts"))
            name = "moe_intermediate_size" if moe else next((name for name in names if name in values), None)
            if name is None:
                raise Refusal(f"{kind}: a {config.model_type} config has no number for their width; leave {kind} out")
            values[name] = of_kind[kind]
    if of_kind["experts"] is not None:
        chosen = values["num_experts_per_tok"]
        if chosen > of_kind["experts"]:
            raise Refusal(f"{of_kind['experts']} experts remain, and a token is sent to {chosen}; keep as many")
    if "hidden" in kept:
        hidden = len(kept["hidden"])
        values[config.attribute_map.get("hidden_size", "hidden_size")] = hidden
        if "rms_norm_eps" in values:
            values["rms_norm_eps"] *= anatomy.hidden / hidden
    values["head_dim"] = anatomy.head_dim  # where the family has none of its own, it is no number of its config
    if "head_dim" not in config.to_dict() and not {"heads", "hidden"} & {anatomy.groups[name].kind for name in kept}:
        del values["head_dim"]
    if "layers" in kept:
        for name, value in values.items():  # layer_types and its like follow their layers
            if "layer" in name and isinstance(value, list) and len(value) == anatomy.layers:
                values[name] = [value[i] for i in kept["layers"]]
        values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept["layers"])
    wanted = _pruned_shapes(config, anatomy, kept)
    refused = ""
    try:
        made = rebuilt(config, values)
        if _shapes(made) == wanted:
            return made, ""
        refused = f"{type(config).__name__} has no number for these widths"
    except (Refusal, ValueError, RuntimeError) as problem:
        refused = str(problem)
    if config.model_type == "llama":  # the same computation, with a head_dim of its own
        relabelled = AutoConfig.for_model(
            "mistral",
            **{k: v for k, v in values.items() if k not in ("model_type", "architectures", "pretraining_tp")},
        )
        relabelled.sliding_window, relabelled.head_dim = None, anatomy.head_dim
        if not (values.get("attention_bias") or values.get("mlp_bias")) and _shapes(relabelled) == wanted:
            return relabelled, "saved as Mistral, which computes the same and whose config has a head_dim of its own"
    raise Refusal(f"the widths that remain cannot be expressed by a {config.model_type} config: {refused}")


def expressible(config: PretrainedConfig, anatomy: Anatomy, kept: Kept) -> bool:
    try:
        smaller_config(config, anatomy, kept)
    except Refusal:
        return False
    return True


def _uniform(kind: str, anatomy: Anatomy, kept: Kept) -> int | None:
    """How many units every group of a kind keeps; None where none is pruned."""
    layers = kept.get("layers", np.arange(anatomy.layers))
    groups = [group for group in anatomy.of(kind) if group.layer in layers]
    counts = {len(kept[group.name]) if group.name in kept else group.units for group in groups}
    if not any(group.name in kept for group in groups):
        return None
    if len(counts) > 1:
        raise Refusal(
            f"{kind}: between {min(counts)} and {max(counts)} remain in different layers, and a config has one number "
            f"for all"
        )
    return counts.pop()


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(each.shape) for name, each in empty_model(config).state_dict().items()}


def _pruned_shapes(config: PretrainedConfig, anatomy: Anatomy, kept: Kept) -> dict[str, tuple[int, ...]]:
    state = empty_model(config).state_dict()
    made = pruned_state(state, anatomy, kept)
    return {name: tuple(tensor.shape) for name, tensor in made.items()}


# Parts


def _placed(name: str, prefix: str, layers: np.ndarray | None) -> str | None:
    """Its name in the smaller model; None where its layer is removed."""
    found = re.match(re.escape(prefix) + r"\.(\d+)\.", name)
    if layers is None or not found:
        return name
    number = int(found[1])
    if number not in layers:
        return None
    return f"{prefix}.{int(np.searchsorted(layers, number))}.{name[found.end() :]}"


def _each_slot(tensor: Tensor, experts: np.ndarray, selected: list[tuple[Axis, np.ndarray]]) -> Tensor:
    """Of [E, …] these experts, with another choice of places in each; all as many."""
    parts = list(tensor.unbind(0))
    for axis, where in selected:
        assert axis.slot is not None
        parts[axis.slot] = parts[axis.slot].index_select(axis.dim - 1, torch.from_numpy(where).to(tensor.device))
    return torch.stack([parts[expert] for expert in experts])


def _fold_norms(made: dict[str, Tensor], anatomy: Anatomy, shrunk: float) -> None:
    """The mean square over d′ channels is not that over d with d − d′ of them zero; `shrunk` is d / d′.

    √(d/d′) goes into the scales, d/d′ into eps (see smaller_config). Where embeddings are multiplied by √d, now √d′,
    the table takes the difference, and where the head is the same table the last norm gives it back.
    """
    factor = shrunk**0.5
    last = 1.0 if any(table in anatomy.aliases.values() for table in anatomy.scaled_tables) else factor
    for name, tensor in made.items():
        if anatomy.aliases.get(name, name) in anatomy.scaled_tables:
            tensor.mul_(factor)
        elif (offset := anatomy.norms.get(name)) is not None:  # all layers have the same norms, whatever their number
            by = last if name == anatomy.final_norm else factor
            tensor.add_(offset).mul_(by).sub_(offset)
