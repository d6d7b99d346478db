"""The process of one stage, or of one of its ranks; and the check before all of them.

python -m pipeline.worker check SPEC     every selected stage refuses what it can; prints the plan as JSON
python -m pipeline.worker prepare SPEC   the single-process part of a stage
python -m pipeline.worker run SPEC       a rank of the rest
python -m pipeline.worker stage SPEC     both, in one process
python -m pipeline.worker serve FD       forks into these, one after the other (pipeline/prefork.py)
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import NotFinite, Problems, Refusal, of_storage
from pipeline import artifact
from pipeline.command_line import OF_RANKS, spelling
from pipeline.config import COUNTS, identity, nearest
from pipeline.launch import die_with

if TYPE_CHECKING:
    from pipeline.context import Context
    from pipeline.stages.stage import Stage


def main(arguments: Sequence[str]) -> int:
    mode, told = arguments
    _quiet()
    if mode == "serve":
        from pipeline.prefork import serve

        return serve(int(told), main)
    spec = artifact.checked(json.loads(Path(told).read_text()))
    die_with(os.getppid())
    context = None
    try:
        if mode == "check":
            print(json.dumps(check(spec, Path(told).parent)))
            return 0
        from pipeline.context import Context

        context = Context(**spec)
        stage = build(context.config, context.stage)
        if mode in ("prepare", "stage"):
            stage.prepare(context)
        if mode in ("run", "stage"):
            stage.run(context)
        return 0
    except Refusal as problem:
        _refuse(mode, str(problem) if context is None else context.in_its_words(str(problem)))
        return 2
    except NotFinite as problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
        return 3
    except Exception as problem:
        if (line := of_storage(problem, Path(spec["config"]["run_dir"]))) is None:
            raise
        _refuse(mode, line)
        return 2


def _refuse(mode: str, message: str) -> None:
    """The check answers its parent; a stage tells the person."""
    if mode == "check":
        print(json.dumps({"refusal": message}), flush=True)
    else:
        print(Refusal(message).told, file=sys.stderr, flush=True)


def check(spec: dict[str, Any], scratch: Path | None = None) -> dict[str, Any]:
    """The plan of every stage that will run. Raises Refusal with all that they refuse. `scratch`: where models that are
    to be made are written down meanwhile."""
    from pipeline.context import Context

    config, typed = spec["config"], spec.get("typed", {})
    made = {}  # all before any is checked, since a stage looks at what later ones need
    for name in needed(config, spec["stages"]):
        with in_words_of(Context(config, name)):
            made[name] = build(config, name)
    problems = Problems()
    with problems:
        _check_taken(config, typed)
    with tempfile.TemporaryDirectory(dir=scratch) as plans:
        with problems:
            plan = _checked(config, made, Path(plans))
        problems.tell()
        shown = _shown(config, made, Path(plans)) if config["show_data"] else []
    plan[0]["warnings"] += _on_one_rank(config, typed, made)
    return {"plan": plan, "shown": shown}


def _shown(config: dict[str, Any], made: dict[str, Stage], plans: Path) -> list[str]:
    """Some of the sequences that the first stage which trains reads, in lines."""
    from pipeline.context import Context
    from pipeline.data.shown import shown

    rows = config["show_data"]
    for name, stage in made.items():
        context, said = Context(config, name), io.StringIO()
        with in_words_of(context), contextlib.redirect_stdout(said):
            reading = stage.reading(context, plans / f"{name}-tokenizer")
            if reading is None:
                continue
            found = shown(*reading, rows, plans / f"{name}-data", documents=max(200, 50 * rows))
        return [*said.getvalue().splitlines(), f"{name}: {found[0]}", *found[1:]]
    raise Refusal(f"show_data={rows}: no stage of this run trains on text; set it to 0")


def _checked(config: dict[str, Any], made: dict[str, Stage], plans: Path) -> list[dict[str, Any]]:
    """What each stage plans. One cause in several stages is told once, and a stage that reads what another one would
    have made, had that not been refused, is not checked."""
    from pipeline.context import Context

    plan, names, told, unknown = [], list(made), Problems(), set[str]()
    subjects: dict[str, str] = {}  # of problems → the stage that has told of it
    for name, stage in made.items():
        context = Context(config, name, plans=plans, planned=names[: names.index(name)])
        problems = Problems()
        with problems:
            if unknown and unknown & {context.produced_by(path) for path in stage.parents(context).values()}:
                unknown.add(name)
                continue
            plan.append(_entry(context, stage))
        if problems.lines and not (plans / name).exists():
            unknown.add(name)
        for line in problems.lines:
            subject = re.sub(rf"(stages\.)?\b{re.escape(name)}\b", "", line.partition(": ")[0])
            if subjects.setdefault(subject, name) == name:
                told.add(line)
    told.tell()
    return plan


def _entry(context: Context, stage: Stage) -> dict[str, Any]:
    config, name = context.config, context.stage
    seed = config["stages"][name].get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise Refusal(f"stages.{name}.seed={seed}: need a whole number of at least 0")
    with in_words_of(context), refusing("config"):
        entry = dataclasses.asdict(stage.check(context))
        if entry["content"] is None:
            entry["content"] = stage.content()
    parents = stage.parents(context)
    entry["warnings"] += _out_of_size(config, name, entry["parameters"])
    return {
        "stage": name,
        "makes": stage.makes,
        "ranks": stage.ranks(context),
        "device": context.device,
        "parents": parents,
        "identity": identity(config, name, immaterial, compared_by_content, parents),
        **entry,
    }


def _check_taken(config: dict[str, Any], typed: Mapping[str, Sequence[str]]) -> None:
    """Refuse a choice on the command line for a stage that the run leaves out: it would change nothing."""
    from pipeline.context import Context
    from pipeline.stages.stage import contract_of

    running = needed(config, config["order"])
    for word, stages in typed.items():
        if not set(stages) & set(running):
            raise Refusal(
                f"{word}: only the stage {stages[0]} takes it, which this run leaves out; it runs with "
                f"{contract_of(Context(config, stages[0]), stages[0]).on_demand}"
            )


def _on_one_rank(config: dict[str, Any], typed: Mapping[str, Sequence[str]], made: dict[str, Stage]) -> list[str]:
    """Told of a strategy or ranks on the command line where no stage has more than one. Refused where the command is
    for the whole run, and no script that submits jobs has added them."""
    from hydra.utils import instantiate

    from pipeline.context import Context

    words = [word for word in typed if OF_RANKS.match(word)]
    two = {**config, "trainer": {**config["trainer"], "devices": 2}}
    if not words or any(stage.ranks(Context(two, name)) > 1 for name, stage in made.items()):
        return []
    told = f"{' '.join(words)}: without effect, as each stage here ({', '.join(made)}) runs on one rank"
    if list(made) == needed(config, config["order"]) and instantiate(config["launch"]).on_this_machine:
        raise Refusal(f"{told}; leave it out")
    return [told]


@contextmanager
def in_words_of(context: Context) -> Iterator[None]:
    """Refusals in it name settings by their keys in this run."""
    try:
        yield
    except Refusal as problem:
        raise Refusal(context.in_its_words(str(problem))) from None


def _out_of_size(config: dict[str, Any], name: str, parameters: int | None) -> list[str]:
    """Told of a stage that trains a model for whose size the experiment's learning rate and batch were not chosen."""
    if not config["sized_for"] or not parameters or "training" not in config["stages"][name]:
        return []
    least, most = config["sized_for"]
    if least / 10 <= parameters <= most * 10:
        return []
    return [
        f"the settings of this experiment are for models of {least:,.0f} to {most:,.0f} parameters, and this one has "
        f"{parameters:,}; choose optimizer.lr, the batch and the length of the training yourself"
    ]


def needed(config: dict[str, Any], stages: list[str]) -> list[str]:
    """`stages` without those made on demand whose folder the rest of the configuration does not name: a teacher that
    is given needs no pretraining, one that runs beside the student no record."""
    from hydra.utils import get_class

    def named(node: Any, folder: str) -> bool:
        if isinstance(node, dict):
            return any(named(value, folder) for value in node.values())
        return any(named(value, folder) for value in node) if isinstance(node, list) else node == folder

    def wanted(name: str) -> bool:
        try:
            if not getattr(get_class(config["stages"][name]["_target_"]), "on_demand", ""):
                return True
        except (ImportError, ValueError):
            return True  # refused when it is built, in better words
        others = {key: node for key, node in config["stages"].items() if key != name}
        return named({**config, "stages": others}, f"{config['run_dir']}/{name}")

    return [name for name in stages if wanted(name)] or stages


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


def immaterial(target: str) -> Collection[str]:
    """The fields that the class `target` declares to change nothing beyond rounding."""
    from hydra.utils import get_object

    return getattr(get_object(target), "immaterial", ())


def compared_by_content(target: str) -> Collection[str]:
    """The fields of the class `target` that name files, where what these hold is compared and not where they lie."""
    from hydra.utils import get_object

    return getattr(get_object(target), "compared_by_content", ())


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {  # annotation → what is needed, and whether it is
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, int | float) and not isinstance(value, bool)),
    "bool": ("true or false", lambda value: isinstance(value, bool)),
    "str": ("a word", lambda value: isinstance(value, str)),
    "Sequence[str]": ("a list [a,b]", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value)),
    "None": ("null", lambda value: value is None),
}


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
        _check_numbers(built, node, where)
        return
    for field in dataclasses.fields(built):
        if field.name in node:
            _check_kind(str(field.type), node[field.name], where, field.name)


def _check_kind(annotation: str, value: Any, where: str, name: str) -> None:
    kinds = re.split(r" \| (?![^\[]*\])", annotation)
    if set(kinds) <= set(_KINDS):
        if not any(_KINDS[kind][1](value) for kind in kinds):
            needed = " or ".join(_KINDS[kind][0] for kind in kinds)
            counted = "; 6B, 900M and 6e9 are understood" if COUNTS.search(name) and isinstance(value, str) else ""
            raise Refusal(f"{where}.{name}={value}: need {needed}{counted}")
    elif isinstance(value, str | list) and all(
        re.fullmatch(r"(?!(Any|Path|Sequence\[.*)$)[A-Z]\w*(\[.*)?|None|dict\[.*", kind) for kind in kinds
    ):
        chosen = value if isinstance(value, str) else next(iter(value), "")
        raise Refusal(
            f"{where}.{name}={value}: a name stands where settings are needed; write {spelling(name, chosen)}"
        )


def _check_numbers(built: Any, node: dict[str, Any], where: str) -> None:
    """Of what is no dataclass, as an optimizer: a word where its default is a number."""
    try:
        known = inspect.signature(built).parameters
    except (TypeError, ValueError):
        return
    for key, value in node.items():
        if isinstance(value, str) and key in known and isinstance(known[key].default, int | float):
            raise Refusal(f"{where}.{key}={value}: need a number, e.g. {key}={known[key].default}")


@contextmanager
def refusing(node: str) -> Iterator[None]:
    """Hydra's complaint about a node in one line; a wrong key is refused with the nearest right one."""
    from hydra.errors import InstantiationException

    try:
        yield
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


def _quiet() -> None:
    """Chatter of libraries that says nothing a person could act on."""
    import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it misses a faster kernel for the CPU


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
