"""A deep model of equal layers, traced by two shallow ones: what it holds and computes grows by the same for each."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from models.load import empty_model
from models.representations import decoder_layers
from models.tracing.step import TEACHER, Step

_SHALLOW = (1, 2)


def equal_layers(config: Any) -> bool:
    """Whether all layers of a model have the same modules and shapes."""
    text = config.get_text_config()
    if len(set(getattr(text, "layer_types", None) or ["one"])) > 1:
        return False
    kinds = {
        tuple(
            (name, type(module), *(tuple(p.shape) for p in module.parameters(recurse=False))) for name, module in each
        )
        for each in (list(layer.named_modules()) for layer in decoder_layers(empty_model(config)))
    }
    return len(kinds) == 1


def shallow(config: Any, depth: int) -> Any:
    """The config with so many of its layers."""
    cut = copy.deepcopy(config)
    text, count = cut.get_text_config(), config.get_text_config().num_hidden_layers
    for name, value in list(vars(text).items()):
        if "layer" in name and isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:depth])
    text.num_hidden_layers = depth
    return cut


def depths(config: Any) -> tuple[int, int] | None:
    """Of two shallow models that stand for it; None where it is traced as it is."""
    count = config.get_text_config().num_hidden_layers
    return _SHALLOW if count > _SHALLOW[1] and equal_layers(config) else None


def deepened(trace: Callable[[int], Step], student: float, teacher: float) -> Step:
    """`trace(0)` and `trace(1)` are of models of which the second has a layer more; `student` and `teacher` say how
    many such layers the first one lacks."""
    first, second = trace(0), trace(1)

    def grown(a: float, b: float, by: float) -> int:
        return round(a + (b - a) * by)

    def held(a: Counter[str], b: Counter[str]) -> Counter[str]:
        # A teacher keeps nothing for a backward: deeper, it holds as much at once.
        return Counter({key: grown(a[key], b[key], student) for key in {*a, *b}})

    return replace(
        first,
        trained=grown(first.trained, second.trained, student),
        frozen=grown(first.frozen, second.frozen, student),
        weight_bytes=grown(first.weight_bytes, second.weight_bytes, student),
        trained_bytes=grown(first.trained_bytes, second.trained_bytes, student),
        teacher=grown(first.teacher, second.teacher, teacher),
        teacher_bytes=grown(first.teacher_bytes, second.teacher_bytes, teacher),
        forward=held(first.forward, second.forward),
        backward=held(first.backward, second.backward),
        optimizer_bytes=grown(first.optimizer_bytes, second.optimizer_bytes, student),
        optimizer_extra=grown(first.optimizer_extra, second.optimizer_extra, student),
        flops=Counter(
            {
                key: grown(first.flops[key], second.flops[key], teacher if key == TEACHER else student)
                for key in {*first.flops, *second.flops}
            }
        ),
    )
