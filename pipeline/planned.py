"""In the check: what is known, without weights, of a model that is there already or that an earlier stage will make,
and what later stages need of its widths."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.folder import check_folder
from models.load import check_weights, load_config
from models.quantization.stored import Outline, read_outline
from models.teachers.sharded import Sharded
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.source import DataSource, check_source
from pipeline.data.tokenizer import load_tokenizer
from pipeline.shared import root
from pipeline.stages.stage import contract_of


def config_of(
    context: Context, path: str, role: str, *, setting: str, trust_remote_code: bool = False, weights: bool = True
) -> Any:
    """The Hugging Face config of `path`: a folder or hub id, checked with its weights (or without: `weights=False`), or
    the folder of a stage of this run. `role` and `setting` are for messages: what the model is to the stage, and the
    setting that names another one. Raises Refusal where the stage that makes it does not run."""
    made_here = context.produced_by(path)
    if not made_here:
        name = Path(path).name
        of_run = name in context.config["stages"] and Path(path) == root(context.config) / name
        if context.share is not None and of_run and not Path(path).exists():  # it takes what the run has made
            raise needs_stage(context, name, setting)
        check_folder(path, role, weights=weights)
    elif context.config_folder(path) == path and not context.finished(path):
        raise needs_stage(context, made_here, setting)
    config = load_config(context.config_folder(path), role, trust_remote_code)
    if not made_here:
        load_tokenizer(path, trust_remote_code)  # what is made of the model takes it along
        if weights:
            check_weights(path, role, config)
    return config


def architecture_of(context: Context, path: str, role: str, *, setting: str, trust_remote_code: bool = False) -> Any:
    """As `config_of`, where neither weights nor a tokenizer need be there: for a forecast."""
    made_here = context.produced_by(path)
    if not made_here:
        check_folder(path, role, weights=False)
    elif context.config_folder(path) == path and not context.finished(path):
        raise needs_stage(context, made_here, setting)
    return load_config(context.config_folder(path), role, trust_remote_code)


def text_bytes(context: Context, data: DataSource) -> int | None:
    """Of the training text, where its files are there to be asked."""
    try:
        told = check_source(context, data).get("train") or {}
    except (Refusal, OSError):
        return None
    return told.get("bytes")


def config_to_change(context: Context, model: str, trust_remote_code: bool) -> Any:
    """The config of the model that a stage changes; its weights must not be packed."""
    setting = context.setting(context.stage, "model")
    config = config_of(context, model, "model", setting=setting, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise Refusal(f"{setting}={model}: its weights are packed; give the model it was made of")
    return config


def teacher_config(context: Context, teacher: Source, weights: bool, runs: bool) -> Any:
    """Its config; with its `weights`, where they are to be opened, looked at as far as that is quick; and where it
    `runs` in this stage, the disk that it is offloaded to."""
    found = config_of(
        context,
        teacher.path,
        "teacher",
        setting="teacher.path",
        trust_remote_code=teacher.trust_remote_code,
        weights=weights,
    )
    recorder = getattr(teacher, "recorder", None)
    key, source = ("teacher", teacher) if recorder is None else ("teacher.recorder", recorder)
    if runs and isinstance(source, Sharded) and context.on_this_machine:
        source.check_disk(found, context.world, min(context.devices, context.world), key)
    return found


def needs_stage(context: Context, stage: str, setting: str) -> Refusal:
    """What a stage reads is another stage's work, which is neither there nor in this run."""
    return Refusal(
        f"{context.stage} needs the stage {stage}, which has not been run, and which this command leaves out (only, "
        f"start, stop); run it too, or give {setting}=FOLDER"
    )


def outline_of(folder: Path) -> Outline | None:
    """Of the quantized weights of a model that is there, or that a stage before plans; None where it is not
    quantized."""
    if (path := artifact.quantized_file(folder)) is not None:
        return read_outline(path)
    if (folder / artifact.PLANNED_QUANTIZED).is_file():
        return Outline.from_json(json.loads((folder / artifact.PLANNED_QUANTIZED).read_text()))
    return None


def multiple_for_later_stages(context: Context) -> int:
    """The least width that this run's later stages all can read."""
    order, stages = context.config["order"], context.config["stages"]
    later = order[order.index(context.stage) + 1 :]
    return math.lcm(*(contract_of(context, name).multiple(stages[name]) for name in later))
