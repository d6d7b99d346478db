"""Before a run every selected stage refuses what it can, and says what it plans; no weight is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import Problems, Refusal
from pipeline import run_folder
from pipeline.building import build, check_kinds, check_settings, refusing
from pipeline.command_line import OF_RANKS
from pipeline.config import identity, share
from pipeline.resources import Resources, check_names, of_preparing, of_stage
from pipeline.shared import root

if TYPE_CHECKING:
    from pipeline.context import Context
    from pipeline.stages.stage import Stage


def check(spec: dict[str, Any], scratch: Path | None = None) -> dict[str, Any]:
    """The plan of every stage that will run. Raises Refusal with all that they refuse. `scratch`: where models that are
    to be made are written down meanwhile."""
    from hydra.utils import instantiate

    from pipeline.context import Context

    config, typed = spec["config"], spec.get("typed", {})
    made = {}  # all before any is checked, since a stage looks at what later ones need
    for name in needed(config, spec["stages"]):
        with in_words_of(Context(config, name)):
            made[name] = build(config, name)
    for name in ("callbacks", "logger", "strategy", "launch"):
        check_kinds(config.get(name), name)
    for name, node in (config.get("callbacks") or {}).items():
        check_settings(["Callback", "None"], node, "callbacks", name)
    problems = Problems()
    with refusing("launch"):
        launcher = instantiate(config["launch"])
    if config["forecast"]["show"]:
        with tempfile.TemporaryDirectory(dir=scratch) as plans:
            return {"plan": [], "shown": [], "forecast": _forecast(config, made, Path(plans))}
    if not config["dry_run"] and not config["prepare_data"]:  # a plan can be made anywhere
        with problems:
            launcher.check()
    with problems:
        _check_taken(config, typed)
    if not made:
        raise Refusal("there is no stage to run")
    with problems:
        needs = _needs(config, made) if launcher.submits else {}
    if config["share"] is not None and (others := [name for name in made if not made[name].shareable]):
        problems.add(f"share={config['share']}: {others[0]} is not shared out; leave share out")
    problems.tell()
    with tempfile.TemporaryDirectory(dir=scratch) as plans:
        with problems:
            plan = _checked(config, made, needs, Path(plans))
        problems.tell()
        shown = _of_text(config, made, Path(plans)) if config["show_data"] or config["prepare_data"] else []
    plan[0]["warnings"] += _on_one_rank(config, typed, made)
    return {"plan": plan, "shown": shown}


def _forecast(config: dict[str, Any], made: dict[str, Stage], plans: Path) -> list[dict[str, Any]]:
    """A row for each stage. One that cannot be traced says so, and the others go on."""
    from pipeline.context import Context
    from pipeline.forecast.forecast import forecast_of

    rows, names = [], list(made)
    for name, stage in made.items():
        context = Context(config, name, plans=plans, planned=names[: names.index(name)])
        with in_words_of(context), refusing("config"):
            workload = stage.workload(context)
            row = {"stage": name, "notes": ["nothing that a GPU has to hold, or done by another program"]}
            if workload is not None:
                try:
                    row = forecast_of(context, workload)
                except Refusal:
                    raise
                except Exception as problem:  # whatever a family's code says of tensors without values
                    said = (str(problem) or type(problem).__name__).splitlines()[0]
                    row = {"stage": name, "notes": [f"its model cannot be traced without weights: {said}"]}
        rows.append(row)
    return rows


def _of_text(config: dict[str, Any], made: dict[str, Stage], plans: Path) -> list[str]:
    """Some of the sequences that the first stage which trains reads, or what a job made of them, in lines."""
    from pipeline.context import Context

    rows, asked = config["show_data"], share(config["prepare_data"] or "")
    for name, stage in made.items():
        context, said = Context(config, name), io.StringIO()
        with in_words_of(context), contextlib.redirect_stdout(said):
            reading = stage.reading(context, plans / f"{name}-tokenizer")
            if reading is None:
                continue
            if asked is not None:
                from pipeline.data.shares import prepare_share

                run_folder.mark(context.run_dir)
                found = prepare_share(*reading, context.data_folder, asked)
            else:
                from pipeline.data.shown import shown

                found = shown(*reading, rows, plans / f"{name}-data", documents=max(200, 50 * rows))
        return [*said.getvalue().splitlines(), f"{name}: {found[0]}", *found[1:]]
    key, remedy = (f"show_data={rows}", "set it to 0") if asked is None else ("prepare_data", "leave it out")
    raise Refusal(f"{key}: no stage of this run trains on text; {remedy}")


def _needs(config: dict[str, Any], made: dict[str, Stage]) -> dict[str, dict[str, Resources | None]]:
    """Of each stage that is to be submitted, what its job asks for (`run`), and the one before it (`prepare`)."""
    from pipeline.context import Context

    told, found = config["launch"]["resources"], {}
    check_names(told, needed(config, config["order"]))
    two = {**config, "trainer": {**config["trainer"], "devices": 2}}
    for name, stage in made.items():
        parallel = stage.ranks(Context(two, name)) > 1
        run = of_stage(told, name, config, parallel=parallel)
        if run.jobs > 1 and not stage.shareable:
            raise Refusal(f"launch.resources.{name}.jobs={run.jobs}: this stage is not shared out; leave it out")
        several = run.nodes * run.ranks_per_node * run.jobs > 1
        found[name] = {"run": run, "prepare": of_preparing(told, name, config) if several else None}
    return found


def _placed(config: dict[str, Any], needs: dict[str, Resources | None] | None) -> tuple[dict[str, Any], str | None]:
    """The configuration of a stage that runs elsewhere as it will be there, and on what."""
    if needs is None:
        return config, "cpu" if config["prepare_only"] else None
    run = needs["run"]
    assert run is not None
    trainer = {**config["trainer"], "nodes": run.nodes, "devices": run.ranks_per_node}
    if config["trainer"]["accelerator"] not in ("auto", "cpu") and not run.gpus_per_node:
        raise Refusal(
            f"trainer.accelerator={config['trainer']['accelerator']}: launch.resources asks for no GPU; use auto"
        )
    if config["trainer"]["accelerator"] == "cpu" and run.gpus_per_node:
        raise Refusal("trainer.accelerator=cpu: launch.resources asks for GPUs; set gpus_per_node=0 there, or use auto")
    return {**config, "trainer": trainer}, "cuda" if run.gpus_per_node else "cpu"


def _checked(
    config: dict[str, Any], made: dict[str, Stage], needs: dict[str, dict[str, Resources | None]], plans: Path
) -> list[dict[str, Any]]:
    """What each stage plans. One cause in several stages is told once, and a stage that reads what another one would
    have made, had that not been refused, is not checked."""
    from pipeline.context import Context

    plan, names, told, unknown = [], list(made), Problems(), set[str]()
    subjects: dict[str, str] = {}  # of problems → the stage that has told of it
    for name, stage in made.items():
        problems = Problems()
        with problems:
            there, place = _placed(config, needs.get(name))
            context = Context(there, name, plans=plans, planned=names[: names.index(name)], place=place)
            if unknown and unknown & {context.produced_by(path) for path in stage.parents(context).values()}:
                unknown.add(name)
                continue
            plan.append(_entry(context, stage) | {"needs": _plain(needs.get(name, {}))})
        if problems.lines and not (plans / name).exists():
            unknown.add(name)
        for line in problems.lines:
            subject = re.sub(rf"(stages\.)?\b{re.escape(name)}\b", "", line.partition(": ")[0])
            if subjects.setdefault(subject, name) == name:
                told.add(line)
    told.tell()
    return plan


def _plain(needs: dict[str, Resources | None]) -> dict[str, Any]:
    return {part: None if each is None else dataclasses.asdict(each) for part, each in needs.items()}


def _entry(context: Context, stage: Stage) -> dict[str, Any]:
    config, name = context.config, context.stage
    seed = config["stages"][name].get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise Refusal(f"stages.{name}.seed={seed}: need a whole number of at least 0")
    with in_words_of(context), refusing("config"):
        if stage.ranks(context) > 1:
            from pipeline.training.settings import check_callbacks

            check_callbacks(context)
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
        return named({**config, "stages": others}, f"{root(config)}/{name}")

    return [name for name in stages if wanted(name)] or stages


def immaterial(target: str) -> Collection[str]:
    """The fields that the class `target` declares to change nothing beyond rounding."""
    from hydra.utils import get_object

    return getattr(get_object(target), "immaterial", ())


def compared_by_content(target: str) -> Collection[str]:
    """The fields of the class `target` that name files, where what these hold is compared and not where they lie."""
    from hydra.utils import get_object

    return getattr(get_object(target), "compared_by_content", ())
