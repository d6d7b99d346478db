"""How a student starts: a folder, a fresh shape, or some of the teacher's layers.

Every start is written as a plain model folder first. So under any strategy, on any number of ranks, training opens
the same bytes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from models.errors import Refusal
from models.folder import check_given
from models.load import empty_model, load_config, load_model
from models.representations import projection_widths
from models.save import save_model


class Start(Protocol):
    """A way to start. `teacher` is a folder or hub id whose config can be read."""

    opens_teacher: ClassVar[bool]  # whether it needs the teacher's weights

    @property
    def path(self) -> str | None:
        """The model folder it starts from, where that is not the teacher."""

    def config(self, teacher: str) -> PretrainedConfig:
        """The student's configuration; reads no weights."""
        ...

    def notes(self, teacher: str) -> list[str]:
        """What it chooses of the configuration that nobody asked for, for the plan."""
        ...

    def materialise(self, teacher: str, tokenizer: Any, folder: Path, seed: int) -> None:
        """Write the starting weights, in fp32, as a plain model folder."""
        ...


@dataclass(frozen=True)
class Folder:
    """An existing model: continue from it."""

    path: str
    opens_teacher: ClassVar[bool] = False

    def config(self, teacher: str) -> PretrainedConfig:
        return load_config(self.path, "student")

    def notes(self, teacher: str) -> list[str]:
        return []

    def materialise(self, teacher: str, tokenizer: Any, folder: Path, seed: int) -> None:
        model = load_model(self.path, dtype=torch.float32, role="student")
        save_model(model, tokenizer, folder, model.state_dict(), torch.float32)


@dataclass(frozen=True)
class Shape:
    """Random weights in the teacher's family, with some of its config's numbers replaced.

    `shape` takes the names of the Hugging Face config, e.g. hidden_size, num_hidden_layers.
    """

    shape: dict[str, Any] = field(default_factory=dict)
    path: None = None
    opens_teacher: ClassVar[bool] = False

    def config(self, teacher: str) -> PretrainedConfig:
        config = self._shaped(teacher)[0]
        made_empty(config, "student.shape")
        return config

    def notes(self, teacher: str) -> list[str]:
        return self._shaped(teacher)[1]

    def _shaped(self, teacher: str) -> tuple[PretrainedConfig, list[str]]:
        base = load_config(teacher, "teacher")
        values = base.to_dict()
        # Some families call the common numbers by names of their own: gpt2's hidden_size is n_embd.
        shape = {base.attribute_map.get(k, k): v for k, v in self.shape.items() if v is not None}
        if other := [k for k in shape if k in _NO_SIZES]:
            raise Refusal(
                f"student.shape.{other[0]}: it is no number of a shape; leave it out, the student has its own"
            )
        if unknown := [k for k in shape if k not in values]:
            inside = [f"{key}.{unknown[0]}" for key, value in values.items() if unknown[0] in _keys(value)]
            close = inside or get_close_matches(unknown[0], values, n=1)
            raise Refusal(
                f"student.shape.{unknown[0]}: {type(base).__name__} has no such number"
                + (f"; did you mean {close[0]}?" if close else "")
            )
        check_counts(base, shape, "student.shape")
        check_sizes({k: v for k, v in values.items() if k != "head_dim"} | shape, "student")
        values, notes = _reshaped(base, shape)
        config = rebuilt(base, values, "student.shape")
        return config, notes + _of_widths(base, config, shape)

    def materialise(self, teacher: str, tokenizer: Any, folder: Path, seed: int) -> None:
        write_fresh(self.config(teacher), tokenizer, folder, seed)


@dataclass(frozen=True)
class Layers:
    """Some of the teacher's layers, its embeddings, norm and head: same widths, less depth.

    `keep` lists the teacher's layer numbers, or gives how many to take evenly spaced, first and last included; `all`
    makes a copy of the teacher.
    """

    keep: Any
    path: None = None
    opens_teacher: ClassVar[bool] = True

    def kept(self, depth: int) -> list[int]:
        if self.keep == "all":
            return list(range(depth))
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | list | tuple | range):
            raise Refusal(f"student.keep={self.keep}: need a number, a list of layer numbers, or all")
        if isinstance(self.keep, int):
            if not 1 <= self.keep <= depth:
                raise Refusal(f"student.keep={self.keep}: the teacher has {depth} layers; need 1 to {depth}")
            return [round(i * (depth - 1) / max(1, self.keep - 1)) for i in range(self.keep)]
        kept = list(self.keep)
        if not kept or not all(type(i) is int and 0 <= i < depth for i in kept) or sorted(set(kept)) != kept:
            raise Refusal(f"student.keep={kept}: need rising layer numbers from 0 to {depth - 1}")
        return kept

    def config(self, teacher: str) -> PretrainedConfig:
        base = load_config(teacher, "teacher")
        depth = base.num_hidden_layers
        kept = self.kept(depth)
        values = base.to_dict()
        for name, value in values.items():  # layer_types and its like follow their layers
            if "layer" in name and isinstance(value, list) and len(value) == depth:
                values[name] = [value[i] for i in kept]
        values["num_hidden_layers"] = len(kept)
        return rebuilt(base, values)

    def notes(self, teacher: str) -> list[str]:
        return []

    def materialise(self, teacher: str, tokenizer: Any, folder: Path, seed: int) -> None:
        source = load_model(teacher, dtype=torch.float32, role="teacher")
        config = self.config(teacher)
        kept = self.kept(source.config.num_hidden_layers)
        names = set(empty_model(config).state_dict())
        state = {}
        for name, tensor in source.state_dict().items():
            if not (found := re.search(r"\.(?:layers|h|blocks|layer)\.(\d+)\.", name)):
                state[name] = tensor
            elif int(found[1]) in kept:
                state[f"{name[: found.start(1)]}{kept.index(int(found[1]))}{name[found.end(1) :]}"] = tensor
        if set(state) != names:
            odd = sorted(set(state) ^ names)[0]
            raise Refusal(f"student=layers: cannot place {odd} of {type(source).__name__}; use student=shape")
        with torch.device("meta"):
            student = AutoModelForCausalLM.from_config(config)
        student.generation_config = source.generation_config
        save_model(student, tokenizer, folder, state, torch.float32)


@dataclass(frozen=True)
class KvHeads:
    """The teacher with fewer KV heads: each is the mean of those whose queries it now serves (arXiv:2305.13245).

    `kv_heads=1` is multi-query attention. Everything else is the teacher's.
    """

    kv_heads: int
    path: None = None
    opens_teacher: ClassVar[bool] = True

    def config(self, teacher: str) -> PretrainedConfig:
        base = load_config(teacher, "teacher")
        had = getattr(base, "num_key_value_heads", None)
        if not isinstance(self.kv_heads, int) or isinstance(self.kv_heads, bool):
            raise Refusal(f"student.kv_heads={self.kv_heads}: need a number; 1 is multi-query attention")
        if had is None:
            raise Refusal(f"student.kv_heads={self.kv_heads}: a {base.model_type} config has no number of KV heads")
        if not 1 <= self.kv_heads <= had or had % self.kv_heads:
            fitting = [n for n in range(1, had + 1) if had % n == 0]
            raise Refusal(
                f"student.kv_heads={self.kv_heads}: the teacher has {had}; need one of {', '.join(map(str, fitting))}"
            )
        return rebuilt(base, base.to_dict() | {"num_key_value_heads": self.kv_heads})

    def notes(self, teacher: str) -> list[str]:
        return []

    def materialise(self, teacher: str, tokenizer: Any, folder: Path, seed: int) -> None:
        source = load_model(teacher, dtype=torch.float32, role="teacher")
        config = self.config(teacher)
        with torch.device("meta"):
            student = AutoModelForCausalLM.from_config(config)
        state, shapes = {}, student.state_dict()
        queries, keys, values = projection_widths(source.config)
        for name, tensor in source.state_dict().items():
            if tensor.shape == shapes[name].shape:
                state[name] = tensor
            elif len(tensor) == keys:
                state[name] = self._pooled(tensor, source.config.num_key_value_heads)
            elif len(tensor) == queries + keys + values:  # side by side, as in Phi-3
                q, k, v = tensor.split([queries, keys, values])
                count = source.config.num_key_value_heads
                state[name] = torch.cat([q, self._pooled(k, count), self._pooled(v, count)])
            if name not in state or state[name].shape != shapes[name].shape:
                raise Refusal(f"student=kv_heads: cannot pool {name} of {type(source).__name__}")
        student.generation_config = source.generation_config
        save_model(student, tokenizer, folder, state, torch.float32)

    def _pooled(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Of [heads · d, …] each run of heads that becomes one, averaged."""
        apart = rows.unflatten(0, (self.kv_heads, count // self.kv_heads, -1))
        return apart.mean(1).flatten(0, 1)


def _reshaped(base: PretrainedConfig, shape: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The teacher's numbers with those of `shape` in their place, and in words what was chosen of what depends on them.

    A head's width and what is listed layer by layer follow the family's own rule to the new shape where that rule gives
    what the teacher has, too; a width that the teacher states otherwise stays, and a list is cut, or repeated.
    """
    had = base.to_dict()
    values, notes = {**had, **{key: _merged(had[key], value) for key, value in shape.items()}}, []
    depth, new_depth = base.num_hidden_layers, values[base.attribute_map.get("num_hidden_layers", "num_hidden_layers")]
    listed = [k for k, v in had.items() if re.search("layer|block", k) and isinstance(v, list) and len(v) == depth]
    free = [k for k in ("head_dim", *listed) if k in had and k not in shape]
    own = _by_rule(base, free)
    for name in free:
        if name == "head_dim":
            if had[name] is None or had[name] == (own.get(name) or base.hidden_size // base.num_attention_heads):
                del values[name]
            elif {"hidden_size", "num_attention_heads"} & shape.keys():
                notes.append(f"head_dim={had[name]} is the teacher's; student.shape.head_dim=… changes it")
        elif own.get(name) == had[name]:
            del values[name]
        elif new_depth != depth:
            values[name] = [had[name][layer % depth] for layer in range(new_depth)]
            how = f"those of the teacher's first {new_depth} layers" if new_depth < depth else "the teacher's, repeated"
            notes.append(f"{name} are {how}; student.shape.{name}=[…] changes them")
    for name, value in values.items():  # what is said of single layers, by their numbers
        if "layer" in name and isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            values[name] = {key: each for key, each in value.items() if int(key) < new_depth}
    return values, notes


def _keys(value: Any) -> Collection[str]:
    return value.keys() if isinstance(value, dict) else ()


def _merged(had: Any, given: Any) -> Any:
    """Of settings inside of a config, as rope_parameters, those that are not given stay the teacher's. Another kind of
    rope has other numbers: it is taken as it is given."""
    if not (isinstance(had, dict) and isinstance(given, dict)):
        return given
    if given.get("rope_type", had.get("rope_type")) != had.get("rope_type"):
        return given
    return had | {key: _merged(had.get(key), value) for key, value in given.items()}


# What some families multiply or divide attention's scores by: of a head's width in most of their models, not in all.
_OF_SCORES = ("query_pre_attn_scalar", "attention_multiplier")


def _of_widths(base: PretrainedConfig, config: PretrainedConfig, shape: dict[str, Any]) -> list[str]:
    """In words, what became of a head's width that nobody asked to change, and of what goes with it."""
    had, has = _head_width(base), _head_width(config)
    if had == has:
        return []
    notes = []
    if "head_dim" not in shape and getattr(base, "head_dim", None) is not None:
        notes.append(
            f"head_dim={has} follows from hidden_size and num_attention_heads, as the teacher's {had} does; "
            f"student.shape.head_dim=… changes it"
        )
    for name in _OF_SCORES:
        if name not in shape and getattr(config, name, None) is not None:
            notes.append(
                f"{name}={getattr(config, name)} is the teacher's, whose heads are {had} wide and not {has}; "
                f"student.shape.{name}=… changes it"
            )
    return notes


def _head_width(config: PretrainedConfig) -> int | None:
    """None where a family has no heads: a state space model's."""
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (
        hidden // heads if hidden and isinstance(heads, int) and heads else None
    )


def _by_rule(base: PretrainedConfig, free: list[str]) -> dict[str, Any]:
    """What the family makes of the teacher's config where nothing is said of `free`."""
    try:
        return rebuilt(base, {k: v for k, v in base.to_dict().items() if k not in free}).to_dict()
    except Refusal:  # it has no rule
        return {}


def write_fresh(config: PretrainedConfig, tokenizer: Any, folder: Path, seed: int) -> None:
    """Random weights by the family's own initialisation, from `seed` alone."""
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    save_model(model, tokenizer, folder, model.state_dict(), torch.float32)


_MOST_LAYERS = 10_000  # one is made, on the meta device, to count its parameters
_OF_THE_FILES = ("model_type", "transformers_version", "_name_or_path", "quantization_config")
_NO_SIZES = (*_OF_THE_FILES, "architectures", "dtype")
_COUNTS = (
    *("hidden_size", "intermediate_size", "head_dim", "vocab_size", "max_position_embeddings"),
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
)


def check_counts(base: PretrainedConfig, given: dict[str, Any], role: str) -> None:
    """Refuse what counts nothing where a size of the family `base` is given, before anything is divided by it."""
    counted = {base.attribute_map.get(name, name) for name in _COUNTS}
    for name, value in given.items():
        if name not in counted or value is None or isinstance(getattr(base, name, None), list):  # a number a layer
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise Refusal(f"{role}.{name}={value}: need a whole number of at least 1")
        if name == base.attribute_map.get("num_hidden_layers", "num_hidden_layers") and value > _MOST_LAYERS:
            raise Refusal(f"{role}.{name}={value}: need at most {_MOST_LAYERS:,} layers")


def check_sizes(values: dict[str, Any], role: str) -> None:
    """Refuse widths that no attention can have, before the family's own config sees them."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    kv = values.get("num_key_value_heads") or heads
    if hidden and heads and hidden % heads and not values.get("head_dim"):
        fitting = [h for h in range(1, min(hidden, 2 * heads) + 1) if hidden % h == 0]
        raise Refusal(
            f"{role}: hidden_size={hidden} is not divisible by num_attention_heads={heads}; heads can be "
            f"{', '.join(map(str, fitting))}"
        )
    if heads and kv and heads % kv:
        fitting = [k for k in range(1, min(heads, 2 * kv) + 1) if heads % k == 0]
        raise Refusal(
            f"{role}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv}; KV heads can "
            f"be {', '.join(map(str, fitting))}"
        )


def rebuilt(base: PretrainedConfig, values: dict[str, Any], role: str = "student") -> PretrainedConfig:
    """A config of the same family with these values; a Refusal where it does not take them."""
    values = {k: v for k, v in copy.deepcopy(values).items() if k not in _OF_THE_FILES}
    with _refusing(f"{role}: {type(base).__name__} refuses this shape"):
        return type(base)(**values)


def made_empty(config: PretrainedConfig, role: str) -> nn.Module:
    """The model of a config with a person's values, without memory; a Refusal where its family makes none of it, or
    where a folder with this config would be refused."""
    check_given(config.to_dict(), role)
    with _refusing(f"{role}: {type(config).__name__} makes no model of these values"):
        return empty_model(config)


@contextmanager
def _refusing(told: str) -> Iterator[None]:
    """A family's own code raises whatever it likes of a value that it does not know."""
    try:
        yield
    except Exception as problem:
        name = "" if isinstance(problem, ValueError | TypeError) else f"{type(problem).__name__}: "
        raise Refusal(f"{told}: {name}{' '.join(str(problem).split())}") from None
