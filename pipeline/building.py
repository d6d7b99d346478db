"""A stage and everything below it, built from its node; what the node says wrong is told in the words of the config."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from models.errors import Refusal
from pipeline.command_line import spelling
from pipeline.config import COUNTS, nearest

if TYPE_CHECKING:
    from pipeline.stages.stage import Stage


def build(config: dict[str, Any], name: str) -> Stage:
    """A stage and everything below it."""
    from hydra.utils import instantiate

    from pipeline.stages.stage import Stage

    check_kinds(config["stages"][name], f"stages.{name}")
    with refusing(f"stages.{name}"):
        made = instantiate(config["stages"][name], _convert_="all")
    if not isinstance(made, Stage):
        raise Refusal(
            f"stages.{name}: {type(made).__name__} is no stage; derive it from "
            f"pipeline.stages.stage.Stage, or take one from conf/stage"
        )
    return made


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation → what is needed, and whether it is
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "None": ("null", lambda value: value is None),
}
_LISTS: dict[str, str] = {  # what a list holds → how it is written
    "str": "a list [a,b]",
    "int": "a list [1,2]",
    "float": "a list [1.0,2.0]",
    "list[str]": "a list of pairs, e.g. [[distill, control]]",
    "list[int]": "a list of pairs, e.g. [[1, 2]]",
}


def _kind(annotation: str) -> tuple[str, Callable[[Any], bool]] | None:
    """What a plain value of this annotation is, in words, and whether it is; None where more than plain values are."""
    annotation = annotation.replace("Sequence[", "list[")
    if annotation in _KINDS:
        return _KINDS[annotation]
    held = annotation.removeprefix("list[").removesuffix("]")
    if held not in _LISTS or annotation != f"list[{held}]" or (inner := _kind(held)) is None:
        return None
    return _LISTS[held], lambda value: isinstance(value, list) and all(inner[1](each) for each in value)


def _kinds_of(annotation: Any) -> list[str]:
    """What an annotation allows, each without its module: as it is written, or evaluated."""
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = re.sub(r"\b(\w+\.)+(?=\w)", "", text)
    text = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", text)
    return re.split(r" \| (?![^\[]*\])", text)


def check_kinds(node: Any, where: str) -> None:
    """Refuse values of another kind than the fields of what they build, all the way down: before a number is compared,
    or taken for another one much later."""
    from hydra.utils import get_object

    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        check_kinds(value, f"{where}.{key}")
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        return
    try:
        built = get_object(node["_target_"])
    except (ImportError, ValueError):
        return  # Hydra says so, in better words
    if not dataclasses.is_dataclass(built):
        _check_arguments(built, node, where)
        return
    for field in dataclasses.fields(built):
        if field.name in node:
            _check_kind(_kinds_of(field.type), node[field.name], where, field.name)


def _check_kind(kinds: list[str], value: Any, where: str, name: str) -> None:
    plain = [kind for kind in map(_kind, kinds) if kind is not None]
    if len(plain) == len(kinds):
        if not any(fits(value) for _, fits in plain):
            needed = " or ".join(words for words, _ in plain)
            counted = "; 6B, 900M and 6e9 are understood" if COUNTS.search(name) and isinstance(value, str) else ""
            raise Refusal(f"{where}.{name}={_shown(value)}: need {needed}{counted}")
    elif all(re.fullmatch(r"(?!(Any|Path|Sequence\[.*)$)[A-Z]\w*(\[.*)?|None|dict\[.*", kind) for kind in kinds):
        check_settings(kinds, value, where, name)


def check_settings(kinds: list[str], value: Any, where: str, name: str) -> None:
    """Of a field that takes an object: it is built of settings, which say by `_target_` of which class."""
    if isinstance(value, dict):
        if "_target_" not in value and not any(kind.startswith(("dict[", "Mapping[")) for kind in kinds):
            raise Refusal(f"{where}.{name}: settings without _target_, the class they are of; conf/ has some to copy")
    elif value is None:
        if "None" not in kinds:
            raise Refusal(f"{where}.{name}=null: settings are needed, and none are given; leave it as it is")
    elif not isinstance(value, str | list):
        raise Refusal(f"{where}.{name}={value}: settings are needed, and no number")
    else:
        chosen = value if isinstance(value, str) else next(iter(value), "")
        raise Refusal(
            f"{where}.{name}={value}: a name stands where settings are needed; write {spelling(name, chosen)}"
        )


def _check_arguments(built: Any, node: dict[str, Any], where: str) -> None:
    """Of what is no dataclass, as an optimizer or a callback: values that its annotations do not take, where they are
    plain ones; and a word, or nothing, where its default is a number."""
    try:
        known = inspect.signature(built).parameters
    except (TypeError, ValueError):
        return
    for key, value in node.items():
        if key not in known or value == (default := known[key].default):
            continue
        kinds = _kinds_of(known[key].annotation)
        if all(map(_kind, kinds)):
            _check_kind(kinds, value, where, key)
        if not isinstance(value, str | None) or not isinstance(default, int | float):
            continue
        if ("None" if value is None else "str") in kinds:
            continue
        need = "true or false" if isinstance(default, bool) else f"a number, e.g. {key}={default}"
        raise Refusal(f"{where}.{key}={_shown(value)}: need {need}")


def _shown(value: Any) -> Any:
    return "null" if value is None else value


@contextmanager
def refusing(node: str) -> Iterator[None]:
    """Hydra's complaint about a node in one line; a wrong key is refused with the nearest right one."""
    from hydra.errors import InstantiationException

    try:
        yield
    except (TypeError, ValueError) as problem:
        if not str(problem).startswith("Instantiation: "):  # of words of Hydra's own, as _partial_
            raise
        raise Refusal(f"{node}: {str(problem).removeprefix('Instantiation: ').splitlines()[0]}") from None
    except InstantiationException as problem:
        cause = problem.__cause__
        where = next(
            (line.split(":", 1)[1].strip() for line in str(problem).splitlines() if line.startswith("full_key:")), ""
        )
        if isinstance(cause, Refusal):  # a format does not know its name in this run
            raise Refusal(re.sub(r"^format\.", f"{where or 'format'}.", str(cause))) from None
        raise Refusal(f"{node}{'.' + where if where else ''}: {_told(cause or problem, str(problem))}") from None


def _told(problem: BaseException, message: str) -> str:
    """A constructor's TypeError in the words of the config, with the nearest key it does take."""
    text = " ".join(str(problem).splitlines()[:2])
    wrong = re.search(r"unexpected keyword argument '(\w+)'", text)
    target = re.search(r"target '([\w.]+)'", message)
    if wrong and target:
        from hydra.utils import get_object

        known = list(inspect.signature(get_object(target[1])).parameters)
        return f"unknown config key {wrong[1]!r}{nearest(wrong[1], known)}"
    if "not supported between instances of 'str'" in text:
        return "a word stands where a number is needed"
    missing = re.search(r"missing \d+ required .*arguments?: (.*)", text)
    return f"{missing[1]} is not set" if missing else text
