"""The command line: what a person types as Hydra wants it, and Hydra's complaints in one line that a person can act on.

Imports nothing heavy: the front door answers `--cfg job` through this module.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from models.errors import Refusal
from pipeline.config import Config, nearest

CONF = Path(__file__).resolve().parent.parent / "conf"
GROUPS = sorted(path.name for path in CONF.iterdir() if path.is_dir())
_LISTS = {"format": "formats", "filter": "filters", "auxiliary": "auxiliaries"}  # groups of which several are chosen
_KINDS = {
    **{"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"},
    **{"int": "a whole number", "float": "a number", "bool": "true or false"},
}
_RENAMED = {"grid": "scheme", "method": "quantizer"}  # since 0.1
_ABSENT = object()
_CHOICES_KEY = re.compile(r"(\w+)\.([\w.]+)=")  # of a choice, as of the group student
_NOT_OF_STAGES = {"experiment", "scale", "stage", "training", "strategy", "logger", "callbacks", "launch"}
OF_RANKS = re.compile(r"(strategy|trainer\.(devices|nodes))(?=[.=])")  # what says how many ranks there are
_OF_HYDRA = {
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--info"),
    *("--shell-completion", "--config-path", "--config-name", "--config-dir", "--experimental-rerun"),
}
_ANSWERED_BY_HYDRA = {"--hydra-help", "--version", "--info", "-i", "--shell-completion", "-sc"}


def arguments(given: Sequence[str]) -> list[str]:
    """The command line as Hydra wants it. Raises Refusal for words that its grammar does not take.

    quickstart where no experiment is named; `stages=[…]` as a selection; `~` as the home folder; GROUP=null as its
    choice `none`; and a sweep whose runs would all have one folder gives each its own.
    """
    words = [_word(word) for word in given]
    if _ANSWERED_BY_HYDRA & set(words):
        return words
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in _OF_HYDRA:
            key, _, value = word[2:].replace("-", "_").partition("=")
            raise Refusal(f"{word}: settings are written KEY=VALUE; write {key}={value or 'true'}")
    for before, word in itertools.pairwise(["", *words]):
        if not word.startswith("-") and not (before.startswith("-") and "=" not in word):  # as in `--cfg job`
            _check_grammar(word)
    at = next((i for i, word in enumerate(words) if "=" in word and not word.startswith("-")), len(words))
    # beside the other overrides: argparse wants them all in one place
    if not any(word.startswith("+experiment=") for word in words):
        words.insert(at, "+experiment=quickstart")
    settings = [word for word in words if "=" in word and not word.startswith("-")]
    if any((found := _CHOICES_KEY.match(word)) and (CONF / found[1]).is_dir() for word in settings):
        composed = composed_without_values(settings)
        words = [_opened(word, composed) for word in words]
        words[at:at] = _passed_on(settings, composed)
    if {"-m", "--multirun"} & set(words) and not any(word.startswith("run_dir=") for word in words):
        same = {override.key_or_group for override in _parsed(words) if not override.is_sweep_override()}
        same_keys = ",".join(f'"{key}"' for key in sorted(same | {"run_dir"}))
        words.insert(at, f"hydra.job.config.override_dirname.exclude_keys=[{same_keys}]")
        words.insert(at, "run_dir=runs/sweeps/${name}/${hydra:job.override_dirname}")
    return words


def settings(given: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The words that compose one run of this command line again; `overrides`: its own, as Hydra has them."""
    places = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd")
    flags = [
        each
        for word, value in itertools.pairwise([*given, ""])
        if word.partition("=")[0] in places
        for each in ([word] if "=" in word else [word, value])
    ]
    return [*flags, *overrides]


def _parsed(words: Sequence[str]) -> list[Override]:
    return OverridesParser.create().parse_overrides([word for word in words if "=" in word and word[0] != "-"])


def _word(word: str) -> str:
    if re.match(r"experiment=", word):
        raise Refusal(f"{word}: write +{word} (an experiment is added to the configuration)")
    word = re.sub(r"^stages=(?=\[|\w)", "only=", word)
    word = re.sub(r"^resume=(?=\w+$)", "resume.mode=", word)
    word = re.sub(r"^forecast=(?=(true|false)$)", "forecast.show=", word)
    word = re.sub(r"^(only|force|resume\.skip_sequences)=(?!null$)([^\[].*)$", r"\1=[\2]", word)
    word = re.sub(r"^(?=launch\.resources\.)", "++", word)  # a stage need not be listed there
    word = re.sub(r"(?<==)~(?=/|$)|(?<=[\[,])~(?=/)", lambda _: os.path.expanduser("~"), word)
    group, equals, value = word.partition("=")
    if equals and not value:
        raise Refusal(f"{word}: it names no value; write {word}VALUE, or {word}null for none")
    if value == "null" and group and (CONF / group).is_dir():
        if not (CONF / group / "none.yaml").is_file():
            raise Refusal(f"{word}: a run needs one; choose {group}={', '.join(names_of(group))}")
        return f"{group}=none"
    return word


def _opened(word: str, composed: DictConfig) -> str:
    """Of the student's shape, which takes any number of its teacher's config, the yaml lists some: with `++` Hydra
    takes the others, too."""
    shape = OmegaConf.select(composed, "student.shape")
    if not re.match(r"student\.shape(\.|=\{)", word) or not isinstance(shape, DictConfig):
        return word
    key, (override,) = word.partition("=")[0], _parsed([word])
    value = override.value()
    given = [key.removeprefix("student.shape.")] if key != "student.shape" else value if isinstance(value, dict) else {}
    return word if {str(each).partition(".")[0] for each in given} <= set(shape) else f"++{word}"


def _passed_on(words: Sequence[str], composed: DictConfig) -> list[str]:
    """Overrides by which GROUP.KEY=VALUE reaches stages that change another key of that choice, and hold a copy of it.

    A stage that has set the key itself keeps its own value. `composed`: the configuration without values.
    """
    given = {word.partition("=")[0] for word in words}
    passed = []
    for word in words:
        if not (found := _CHOICES_KEY.match(word)) or not (CONF / found[1]).is_dir():
            continue
        group, key = found.groups()
        value, added = _written(composed, f"{group}.{key}"), ""
        if value is _ABSENT:
            if _opened(word, composed) == word:  # Hydra says so
                continue
            added = "++"
        for path, copy in _copies(composed.get("stages") or {}, group, "stages"):
            same_class = copy.get("_target_") == OmegaConf.select(composed, f"{group}._target_")
            if same_class and _written(copy, key) == value and f"{path}.{key}" not in given:
                passed.append(f"{added}{path}.{key}=${{{group}.{key}}}")
    return passed


def _written(node: Any, key: str) -> Any:
    """The value of a key, or where it is taken from a value that is still to be given, that interpolation."""
    try:
        return OmegaConf.select(node, key, default=_ABSENT)
    except InterpolationToMissingValueError:
        parent, _, last = key.rpartition(".")
        whole: Any = OmegaConf.to_container(OmegaConf.select(node, parent) if parent else node, resolve=False)
        return whole[last]


def _copies(node: Any, name: str, path: str) -> Iterator[tuple[str, DictConfig]]:
    """Every place below `node` that has a node of this name which is no interpolation."""
    for key in map(str, node) if isinstance(node, DictConfig) else ():
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if key == name and isinstance(node[key], DictConfig):
            yield f"{path}.{key}", node[key]
        else:
            yield from _copies(node[key], name, f"{path}.{key}")


def takers(composed: DictConfig, words: Sequence[str]) -> dict[str, list[str]]:
    """Each choice, or value of one, with the stages of the run that take it; and what says how many ranks there are
    (strategy, trainer.devices), with all of them. Raises Refusal for a choice that no stage takes: it would change
    nothing."""
    whole: Any = OmegaConf.to_container(composed, resolve=False)
    taken = {name: _taken(whole, name) for name in whole["order"]}
    found = {}
    for word in words:
        word = word.removeprefix("++")
        group = re.match(r"(\w+)(?=[.=])", word)
        key = _key_of(group[1]) if group else ""
        choices = {*map(_key_of, GROUPS), "model"} - _NOT_OF_STAGES
        value = word.partition("=")[2]
        if OF_RANKS.match(word) and value not in ("single", "1", "auto"):
            found[word] = list(taken)
        if key not in choices or value in ("none", "[]"):
            continue
        found[word] = [name for name, keys in taken.items() if key in keys]
        if not found[word]:
            name = OmegaConf.select(composed, "name")
            teaches = key == "model" and any("teacher" in keys for keys in taken.values())
            other = "; the teacher is teacher.path" if teaches else ""
            raise Refusal(f"{word}: no stage of {name} takes it; its stages are {', '.join(composed.order)}{other}")
    return found


def _taken(whole: dict[str, Any], stage: str) -> set[str]:
    """The keys at the top of the configuration (not resolved) that a stage takes, or that those take."""

    def mentioned(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            # A copy, changed; but a stage's own `model` is what it makes or a path, never a copy of the one at the top.
            yield from (name for name, value in node.items() if isinstance(value, dict) and name != "model")
            node = list(node.values())
        if isinstance(node, list):
            for value in node:
                yield from mentioned(value)
        if isinstance(node, str):
            yield from re.findall(r"\$\{(\w+)", node)

    found: set[str] = set()
    new = set(mentioned(whole["stages"].get(stage)))
    while new := {name for name in new if name in whole and name != "stages"} - found:
        found |= new
        new = {name for key in new for name in mentioned(whole[key])}
    return found


def _check_grammar(word: str) -> None:
    """Refuse what Hydra's grammar does not take, with the spelling that works."""
    parser = OverridesParser.create()
    try:
        parser.parse_overrides([word])
        return
    except HydraException:
        pass
    key, equals, value = word.partition("=")
    if not equals:
        experiment = (CONF / "experiment" / f"{word}.yaml").is_file()
        raise Refusal(f"{word}: it names no value; write {f'+experiment={word}' if experiment else f'{word}=VALUE'}")
    is_list = value.startswith("[") and value.endswith("]")
    parts = value[1:-1].split(",") if is_list else [value]
    parts = [part if re.fullmatch(r"[\w./-]*", part) else f'"{part.strip(chr(34))}"' for part in parts]
    quoted = f"{key}=[{','.join(parts)}]" if is_list else f"{key}={parts[0]}"
    try:
        parser.parse_overrides([quoted])
    except HydraException:
        raise Refusal(f"{word}: Hydra's grammar does not take this value; see hydra.cc's override grammar") from None
    raise Refusal(f"{word}: a value with = or brackets needs quotes of its own; write '{quoted}'")


def _key_of(group: str) -> str:
    """Where the choice of a group stands in the configuration."""
    return _LISTS.get(group, group)


def names_of(group: str) -> list[str]:
    """The choices of a group."""
    return sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).glob("**/*.yaml"))


def explain(problem: Exception, words: Sequence[str]) -> str:
    """Hydra's and OmegaConf's errors in one line; `words` are the arguments that were composed."""
    text = " ".join(str(problem).split())
    if found := re.search(r"Could not override '([^']+)'", text):
        return _unknown(found[1], words)
    if found := re.search(r"Error merging override (\S+)", text):
        return _unfit(found[1], str(problem.__cause__ or ""))
    if found := re.search(
        r"Could not find '([^']+)/([^'/]+)' Available options in '[^']+': (.*?) Config search path", text
    ):
        return _no_such(found[1], found[2], found[3].split())
    if found := re.search(r"Missing mandatory value: ([\w.]+)", text):  # of what another value is taken from
        return f"{found[1]} is not set; give {found[1]}=…"
    if found := re.search(r"Could not load '(\w+)/([\w/]+)'", text):
        return _no_such(found[1], found[2], names_of(found[1]))
    return text


def _no_such(group: str, name: str, known: list[str]) -> str:
    told = f"{group}={name}: no such choice"
    if group == "scheme" and (found := re.fullmatch(r"w([2-8])a16_g(\d+)", name)):
        bits, size = found.groups()
        near = next((each for each in known if each.startswith(f"w{bits}a16_g")), "")
        keys = [*([] if near else [f"scheme.weights.bits={bits}"]), f"scheme.weights.group_size={size}"]
        return f"{told}; write scheme={' '.join([near or 'w4a16_g128', *keys])}"
    if longer := [each for each in known if each.startswith(name)]:
        return f"{told}; did you mean {' or '.join(longer)}?"
    return told + nearest(name, known)


def _unfit(word: str, why: str) -> str:
    """A value of another kind than the schema's."""
    key, _, value = word.partition("=")
    if found := re.search(r"could not be converted to (\w+)", why):
        return f"{key}={value}: need {_KINDS.get(found[1], found[1])}"
    if found := re.search(r"is not a valid (\w+)", why):
        return f"{key}={value}: need {_KINDS.get(found[1], found[1])}"
    node = OmegaConf.select(OmegaConf.structured(Config), key)
    if key in _LISTS.values():
        group = next(name for name, plural in _LISTS.items() if plural == key)
        return (
            f"{key}={value}: need settings; choose some by name: {group}={value if value[:1] == '[' else f'[{value}]'}"
        )
    if OmegaConf.is_dict(node):
        keys = ", ".join(f"{key}.{name}=…" for name in node)
        return f"{key}={value}: need settings; set its keys one by one: {keys}"
    if OmegaConf.is_list(node):
        return f"{key}={value}: need a list, e.g. {key}=[{'' if value == 'null' else value}]"
    return f"{key}={value}: {why.splitlines()[0] if why else 'does not fit'}"


def _unknown(key: str, words: Sequence[str]) -> str:
    """A key that is not there: taken from another place, a choice in the wrong place, or misspelt."""
    key = key.lstrip("+~")
    value = next((word.partition("=")[2] for word in words if word.lstrip("+~").startswith(f"{key}=")), "")
    told = f"unknown config key {key!r}"
    node: Any = composed_without_values(words)
    walked: list[str] = []
    for part in key.split("."):
        if isinstance(node, ListConfig) or not isinstance(node, DictConfig):
            group = next((name for name in GROUPS if [_key_of(name)] == walked), None)
            return told + (f"; choose {group}= first, of {', '.join(names_of(group))}" if group else "")
        if part not in node:
            group = next((name for name, plural in _LISTS.items() if [plural] == walked), None)
            if group and part in names_of(group):
                return f"{told}; choose it: {group}=[{','.join([*map(str, node), part])}]"
            if choice := _choice(node, value):
                return f"{told}; write {choice}={value}"
            if (new := _RENAMED.get(part)) and new in node:
                return f"{told}; it is called {new}: {new}=CHOICE, of {', '.join(names_of(new))}"
            known = [str(name) for name in node]
            inside = [name for name in known if part in _keys(node, name)]
            if inside and not difflib.get_close_matches(part, known, n=1, cutoff=0.8):
                return f"{told}; did you mean {' or '.join('.'.join([*walked, name, part]) for name in inside)}?"
            return told + (nearest(part, known) if known else f"; nothing is set there yet: +{key}=…")
        walked.append(part)
        if OmegaConf.is_interpolation(node, part) and ".".join(walked) != key:
            source = re.fullmatch(r"\$\{([\w.]+)\}", str(dict(node.items_ex(resolve=False))[part]))
            if source:
                rest = key[len(".".join(walked)) :]
                for group, plural in _LISTS.items():
                    if plural != source[1]:
                        continue
                    told = f"{key}={value}: {'.'.join(walked)} is taken from {plural}"
                    if value in names_of(group):
                        return f"{told}; write {group}=[{value}]"
                    if other := next((name for name in GROUPS if value in names_of(name)), None):
                        return f"{told}; write +{other}@{plural}{rest}={value}"
                return f"{key}={value}: {'.'.join(walked)} is taken from {source[1]}; write {source[1]}{rest}={value}"
        node = node[part]
    return told


def _keys(node: DictConfig, name: str) -> set[str]:
    """Of the node of this name; none where it is a value, not set, or taken from another place."""
    if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
        return set()
    return {str(key) for key in node[name]} if isinstance(node[name], DictConfig) else set()


def _choice(node: DictConfig, value: str) -> str:
    """The group whose choice `value` is, among those that this node takes."""
    return next((str(name) for name in node if value and (CONF / str(name) / f"{value}.yaml").is_file()), "")


def spelling(name: str, value: str) -> str:
    """How `value` is chosen where the field `name` of a stage takes a choice."""
    groups = [name, name.removesuffix("s"), *GROUPS]
    found = next((group for group in groups if (CONF / group / f"{value}.yaml").is_file()), None)
    return f"{found}={value}" if found else f"one of the choices in conf/, as {name}=CHOICE"


def composed_without_values(words: Sequence[str]) -> DictConfig:
    """The configuration by the choices on the command line alone."""
    groups = [word for word in words if re.match(r"\+?[\w/@.]+=", word) and _names_choice(word)]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        try:
            return compose("config", groups)
        except HydraException:
            return compose("config", [word for word in words if word.startswith("+experiment=")])


def _names_choice(word: str) -> bool:
    group, _, value = word.lstrip("+").partition("=")
    names = value.strip("[]").split(",")
    return all((CONF / group.partition("@")[0] / f"{name}.yaml").is_file() for name in names)


def choices() -> Iterator[tuple[str, str, str]]:
    """(group, choice, what its yaml says of it in its first comment) of everything in conf/."""
    for path in sorted(CONF.glob("*/**/*.yaml")):
        group = path.relative_to(CONF).parts[0]
        yield group, str(path.relative_to(CONF / group).with_suffix("")), first_comment(path)


def first_comment(path: Path) -> str:
    """The first sentence of a yaml's head comment, the package header left out; it ends with a full stop, or with a
    colon at the end of a line."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    head = itertools.takewhile(lambda line: line.startswith("#"), lines)
    text = "\n".join(line.lstrip("# ") for line in head)
    return " ".join(re.split(r"\.\s|:\n", text, maxsplit=1)[0].rstrip(".:").split())
