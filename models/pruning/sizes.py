"""What a model costs, from the shapes of its parameters alone: the whole model, and one that keeps some of its units.

Costs are parameters, multiplications of one token, or bytes of its keys and values; no weights are needed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.pruning.groups import Anatomy, Group
from models.pruning.surgery import Kept

PER = ("unit", "parameter", "mac", "kv_byte")


@dataclass(frozen=True)
class Size:
    parameters: int
    macs: int  # multiply-accumulates of one token's matrix products, attention over its context left out
    kv_bytes: int  # of one token in the cache, in 16 bits


@dataclass(frozen=True)
class Shapes:
    """Of a model's parameters, each once; and of what they cost."""

    anatomy: Anatomy
    of: dict[str, tuple[int, ...]]
    embeddings: frozenset[str]  # looked up, not multiplied
    head: str  # its weight, multiplied even where it is the embeddings' table
    experts_per_token: int

    @classmethod
    def of_model(cls, model: Any, anatomy: Anatomy) -> Shapes:
        import torch

        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in model.named_parameters()}
        tables = {f"{at}.weight" for at, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
        linear = model.get_output_embeddings()
        name = next(f"{at}.weight" for at, module in model.named_modules() if module is linear)
        text = model.config.get_text_config()
        return cls(
            anatomy, shapes, frozenset(tables), anatomy.aliases.get(name, name), getattr(text, "num_experts_per_tok", 0)
        )

    def size(self, kept: Kept) -> Size:
        """Of the model that keeps these units."""
        anatomy = self.anatomy
        shrunk: dict[str, dict[int, int]] = {}
        slots: dict[str, dict[int, int]] = {}
        for name, units in kept.items():
            for axis in anatomy.groups[name].axes:
                count = len(units) * axis.places.shape[1]
                if axis.slot is None:
                    shrunk.setdefault(axis.parameter, {})[axis.dim] = count
                else:  # the same width on both of its matrices' sides: one number is enough
                    slots.setdefault(axis.parameter, {})[axis.slot] = count
        layers = set(kept["layers"].tolist()) if "layers" in kept else set(range(anatomy.layers))
        parameters = macs = 0
        for name, shape in self.of.items():
            found = re.match(re.escape(anatomy.prefix) + r"\.(\d+)\.", name)
            if found and int(found[1]) not in layers:
                continue
            dims = [shrunk.get(name, {}).get(dim, width) for dim, width in enumerate(shape)]
            numel = math.prod(dims)
            if name in slots:
                numel = self._in_slots(name, dims, slots[name], kept)
            parameters += numel
            if len(shape) == 3:
                macs += numel * self.experts_per_token // max(1, dims[0])
            elif len(shape) == 2 and (name not in self.embeddings or name == self.head):
                macs += numel
        heads = sum(
            len(kept[group.name]) if group.name in kept else group.units
            for group in anatomy.of("heads")
            if group.layer in layers
        )
        return Size(parameters, macs, 2 * 2 * heads * anatomy.head_dim)

    def _in_slots(self, name: str, dims: list[int], widths: dict[int, int], kept: Kept) -> int:
        dims_of = [axis.dim for group in self.anatomy.of("mlp") for axis in group.axes if axis.parameter == name]
        dim = dims_of[0]
        of_experts = np.arange(self.of[name][0])
        for group in self.anatomy.of("experts"):
            if group.name in kept and name in {axis.parameter for axis in group.axes}:
                of_experts = kept[group.name]
        other = math.prod(width for number, width in enumerate(dims) if number not in (0, dim))
        return sum(widths.get(int(expert), dims[dim]) * other for expert in of_experts)

    def cost(self, group: Group, per: str) -> float:
        """Of one unit of a whole model."""
        if per == "unit":
            return 1.0
        none = np.arange(group.units)
        whole, less = self.size({group.name: none}), self.size({group.name: none[1:]})
        field = {"parameter": "parameters", "mac": "macs", "kv_byte": "kv_bytes"}[per]
        return float(getattr(whole, field) - getattr(less, field))
