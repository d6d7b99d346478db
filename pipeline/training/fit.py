"""Training a model folder on rows into an artifact: the one place that calls Trainer.fit."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from models.errors import Refusal
from models.load import (
    attention_for,
    empty_model,
    load_config,
    load_model,
    parameter_count,
    save_model,
)
from models.lora import Lora, merge, write_adapter
from models.objectives.term import Objective
from models.quantization.aware import Aware
from models.quantization.proof import bits_per_weight, check_held
from models.quantization.record import BlockRecord, Record, open_record
from models.sharding import gather_state, unsharded
from models.sparsity import zeros
from models.teachers.teacher import Opening, Source
from models.training.language_model import LanguageModel
from models.training.on_policy import OnPolicy, Rollouts, ends_of
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.conversations import with_template
from pipeline.data.loader import Rows, accumulation
from pipeline.data.pairs import common_prefix
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource
from pipeline.data.token_bytes import vocabulary_pairs
from pipeline.data.tokenizer import load_tokenizer
from pipeline.training.strategy import prepare_environment

_LEFT_OUT = ("held_out", "truncated", "too_long", "demonstrations_left_out", "across")  # of the text, and worth a line
_PROOF_ROWS, _MERGED_TOLERANCE = 4, 1e-4  # of the largest logit
SAVED = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}


@dataclass(frozen=True)
class Training:
    """How long and how fast; the first limit that is reached ends the stage."""

    # fields that change nothing that is made, beyond rounding (pipeline/config.py, identity)
    immaterial: ClassVar[frozenset[str]] = frozenset({"micro_batch", "workers"})

    optimizer: Callable[..., torch.optim.Optimizer]
    schedule: Callable[[torch.optim.Optimizer, int], Any]
    global_batch: int  # rows per optimizer step, over all ranks
    micro_batch: int  # rows a rank works on at once; memory only, not numbers
    max_steps: int | None = None
    max_tokens: int | None = None
    epochs: float | None = None
    weight_decay: float = 0.1  # norms and biases are exempt
    gradient_clip: float | None = 1.0
    activation_checkpointing: bool = False
    validate_every_steps: int | None = None
    workers: int = 0

    def __post_init__(self) -> None:
        if self.max_steps is None and self.max_tokens is None and self.epochs is None:
            raise Refusal("training has no end: set max_steps, max_tokens or epochs")
        for name in ("max_steps", "max_tokens", "epochs", "global_batch", "micro_batch", "validate_every_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise Refusal(f"training.{name}={value}: need a number above 0")

    def length(self) -> str:
        """For the plan: what ends the stage."""
        limits = {"steps": self.max_steps, "tokens": self.max_tokens, "epochs": self.epochs}
        return " or ".join(f"{value:,} {name}" for name, value in limits.items() if value is not None)


def check(context: Context, training: Training, precision: Any) -> None:
    """Refuse what can be seen to fail before anything is loaded."""
    trainer = context.config["trainer"]
    cadence = trainer["checkpoint"]
    for name, value in {
        "nodes": trainer["nodes"],
        "log_every_steps": trainer["log_every_steps"],
        "objective_memory_mb": trainer["objective_memory_mb"],
        "checkpoint.every_steps": cadence["every_steps"],
        "checkpoint.every_minutes": cadence["every_minutes"],
        "checkpoint.keep": cadence["keep"],
    }.items():
        if value is not None and not value > 0:
            raise Refusal(f"trainer.{name}={value}: need a number above 0")
    if trainer["nodes"] > 1 and not instantiate(context.config["launch"]).several_nodes:
        raise Refusal(
            f"trainer.nodes={trainer['nodes']}: several nodes need launch=slurm inside an allocation; "
            f"slurm/train.sbatch does both"
        )
    if trainer["attention"] not in ("auto", "sdpa", "eager", "flash_attention_2"):
        raise Refusal(f"trainer.attention={trainer['attention']}: need auto, sdpa, eager or flash_attention_2")
    if trainer["attention"] == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Refusal("trainer.attention=flash_attention_2: the package flash_attn is not installed; use auto")
    if precision not in SAVED:
        raise Refusal(f"trainer.precision={precision}: need {' or '.join(SAVED)}")
    device = context.device
    if precision == "bf16-mixed" and device == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refusal(f"trainer.precision=bf16-mixed: {torch.cuda.get_device_name()} has no bf16; use 32-true")
    if device == "cuda" and context.devices > torch.cuda.device_count() and "SLURM_JOB_ID" not in os.environ:
        raise Refusal(f"trainer.devices={context.devices}: this machine has {torch.cuda.device_count()} GPUs")
    if not context.strategy.several_ranks and context.world > 1:
        raise Refusal(
            f"strategy=single runs one process, and trainer asks for {context.world}; use strategy=ddp, zero2 or zero3"
        )
    accumulation(training.global_batch, training.micro_batch, context.world)
    if context.config["logger"] is not None:
        instantiate(context.config["logger"])
    try:
        _callbacks(context)
        training.schedule(training.optimizer([torch.nn.Parameter(torch.zeros(1))]), 10)
    except (TypeError, ValueError) as problem:
        raise Refusal(f"stages.{context.stage}.training or callbacks: {str(problem).splitlines()[0]}") from None
    last_checkpoint(context.work / "checkpoints", context.strategy.sharded, context.world)


def check_length(config: Any, data: DataSource, role: str) -> None:
    name = "max_length"
    if role == "teacher" and data.teacher_prompts:
        name = "teacher_max_length"
    length = getattr(data, name)
    if (limit := getattr(config, "max_position_embeddings", None)) and limit < length:
        raise Refusal(f"{data.node}.{name}={length}: the {role} reads at most {limit} tokens (max_position_embeddings)")


def check_disk(context: Context, parameters: int) -> None:
    """A run that fills the disk dies hours later, with its checkpoint half written."""
    keep = context.config["trainer"]["checkpoint"]["keep"]
    needed = parameters * 4 * (1 + 3 * (keep + 1))  # the artifact, and per checkpoint weights and two Adam moments
    place = context.run_dir
    while not place.exists():
        place = place.parent
    had = sum(p.stat().st_size for p in context.work.rglob("*") if p.is_file()) if context.work.exists() else 0
    free = shutil.disk_usage(place).free + had
    if free < needed and not context.finished(str(context.out)):
        raise Refusal(
            f"run_dir={context.run_dir}: {context.stage} needs about {needed / 1e9:.1f} GB for checkpoints and "
            f"result, and {free / 1e9:.1f} GB are free; choose another run_dir or a smaller "
            f"trainer.checkpoint.keep"
        )


def prepare(
    context: Context,
    data: DataSource,
    tokenizer: Any,
    write_start: Callable[[Path], None],
    teacher_tokenizer: Any = None,
) -> None:
    """Tokenize and pack, and write the weights training starts from. One process; the ranks come after."""
    context.work.mkdir(parents=True, exist_ok=True)
    with_template(tokenizer, data)  # the finished model is to be talked to as it was taught
    folders: dict[str, str | None] = {"start": str(context.work / "start")}
    statistics = {}
    for split in ("train", "validation"):
        other = teacher_tokenizer if split == "train" else None
        rows, statistics[split], folder = sequences_of(data, split, tokenizer, context.data_folder, other)
        folders[split] = str(folder) if len(rows) else None
        if split == "train":
            prefix = common_prefix(rows)
        if left_out := {name: count for name in _LEFT_OUT if (count := statistics[split].get(name))}:
            told = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in left_out.items())
            print(f"{context.stage}: {split}: {told}", flush=True)
        if split == "train" and not len(rows):
            raise Refusal(f"{context.stage}: no row of data.train is left after tokenizing ({statistics[split]})")
    start = context.work / "start"
    if not start.exists():
        aside = context.work / ".start.partial"
        shutil.rmtree(aside, ignore_errors=True)
        write_start(aside)
        os.rename(aside, start)
    artifact.write_json(context.work / "prepared.json", {**folders, "statistics": statistics, "prefix": prefix})


def train(
    context: Context,
    *,
    objective: Objective,
    teacher: Source | None,
    data: DataSource,
    training: Training,
    precision: Any,
    teacher_tokenizer: Any = None,
    on_policy: OnPolicy | None = None,
    lora: Lora | None = None,
    keep_zeros: bool = False,
    qat: Aware | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Fit `<work>/start` on the prepared rows and publish `<run_dir>/<stage>/`. Runs on every rank.

    `teacher_tokenizer`: where it is not the student's, and rows carry the teacher's tokens and their spans. `lora`:
    adapters are trained, and merged in the end; they lie beside the model too, in `adapter/`. `keep_zeros`: the start's
    zeros stay (models/sparsity/zeros.py); adapters that are masked for it make no `adapter/`, as PEFT would not. `qat`:
    the start has a grid.safetensors, and its matrices stay on that grid.
    """
    from datasets import load_from_disk

    prepared = json.loads((context.work / "prepared.json").read_text())
    settings, device = context.config["trainer"], context.device
    prepare_environment(device)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # it sets itself to INFO when imported
    tokenizer = load_tokenizer(prepared["start"])
    attention = attention_for(settings["attention"], device, SAVED[precision])
    validation = load_from_disk(prepared["validation"]) if prepared["validation"] else None
    if validation is not None and data.validation_sequences is not None and len(validation) > data.validation_sequences:
        validation = validation.select(np.linspace(0, len(validation) - 1, data.validation_sequences, dtype=int))
    rows = Rows(
        load_from_disk(prepared["train"]),
        validation,
        seed=context.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        pad_token=pad_token(tokenizer),
        length=data.max_length if data.packing else None,
        workers=training.workers,
    )
    # Now: once a ZeRO-3 trainer exists, every model made is sharded, which takes all ranks.
    student_config = load_config(prepared["start"])
    empty = empty_model(student_config)
    parameters = parameter_count(empty)
    adapter = None if lora is None else lora.config(empty)
    configs = None
    if teacher is not None and objective.representations:
        configs = (student_config, load_config(teacher.path, "teacher", teacher.trust_remote_code))
    steps = rows.steps(max_steps=training.max_steps, max_tokens=training.max_tokens, epochs=training.epochs)
    pairs = None
    if teacher_tokenizer is not None:
        students, teachers = vocabulary_pairs(tokenizer, teacher_tokenizer)
        pairs = (torch.from_numpy(students), torch.from_numpy(teachers))
    # Several prompts of the teacher's stand in one row, whatever the student's do.
    packed = data.packing or data.teacher_prompts > 1
    opening = Opening(len(teacher_tokenizer or tokenizer), attention, packed, pairs, prepared["prefix"], context.device)
    budget = settings["objective_memory_mb"]
    load_plain = functools.partial(
        load_model, prepared["start"], dtype=torch.float32, attention=attention, role="student"
    )

    rounding = None if qat is None else qat.open(Path(prepared["start"]) / artifact.GRID, empty)

    def load_student() -> Any:
        student = load_plain() if lora is None else lora.attach(load_plain(), context.seed, SAVED[precision])
        student = zeros.keep(student) if keep_zeros else student
        return student if rounding is None else rounding.attach(student)

    rollouts = None
    if on_policy is not None:
        ends = {tokenizer.eos_token_id, *ends_of(rows.train)} - {None}
        rollouts = Rollouts(
            on_policy,
            rows=rows.train,
            step_rows=rows.order().step_rows,
            collate=functools.partial(collate, pad_token=rows.pad_token),
            load_student=load_student,
            seed=context.seed,
            pad_token=rows.pad_token,
            end_tokens=sorted(ends),
            stop=data.stops,
            tokenizer=tokenizer,
        )
    module = LanguageModel(
        load_student=load_student,
        load_teacher=None if teacher is None else lambda: teacher.open(opening),
        objective=objective,
        optimizer=training.optimizer,
        schedule=training.schedule,
        weight_decay=training.weight_decay,
        max_steps=steps,
        vocabulary=len(tokenizer),
        packed=data.packing,
        seed=context.seed,
        log_every_steps=settings["log_every_steps"],
        activation_checkpointing=training.activation_checkpointing,
        configs=configs,
        memory_bytes=None if budget is None else budget * 2**20,
        compiled=settings["compile"],
        on_policy=rollouts,
        rounding=rounding,
    )
    micro_batches = accumulation(training.global_batch, training.micro_batch, context.world)
    checkpoint = last_checkpoint(context.work / "checkpoints", context.strategy.sharded, context.world)
    trainer = pl.Trainer(
        accelerator=device,
        devices=context.devices,
        num_nodes=settings["nodes"],
        precision=precision,
        strategy=context.strategy.lightning(device),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=training.gradient_clip,
        default_root_dir=context.work,
        # in micro-batches; without a setting, once at the end
        val_check_interval=min(training.validate_every_steps or steps, steps) * micro_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validation is not None else 0,
        num_sanity_val_steps=0,
        logger=_logger(context),
        callbacks=_callbacks(context),
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=settings["log_every_steps"],
    )
    trainer.fit(
        module, datamodule=rows, ckpt_path=checkpoint, weights_only=False
    )  # our own file, with the optimizer's and the loops' state

    state = gather_state(module.student, keep=trainer.is_global_zero)
    model = module.student
    also: list[Callable[[Path], None]] = []
    certificates: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    if trainer.is_global_zero and (lora is not None or rounding is not None):
        with unsharded():
            model = load_plain(attention=None)  # on the CPU, where FlashAttention cannot run
            model = model if lora is None else lora.attach(model, context.seed, compute=None)
        model = zeros.keep(model) if keep_zeros else model
        model = model if rounding is None else rounding.attach(model)
        learnt = {
            name: tensor
            for name, tensor in state.items()
            if lora is None
            or "lora_" in name
            or (rounding is not None and name.rpartition(".")[2] in rounding.rule.own)
        }
        assert learnt.keys() == {name for name in model.state_dict() if name in learnt or "lora_" in name}
        model.load_state_dict(learnt, strict=False)
        if lora is not None and rounding is None and not keep_zeros:
            folder = str(context.parents["student"]["path"]) if "student" in context.parents else prepared["start"]
            also.append(lambda out: write_adapter(adapter, folder, learnt, out / "adapter"))
        if rounding is None:
            certificates["merged_equals_adapter"] = _unchanged(context, model, rows, merge, SAVED[precision])
        else:
            rounding.rule.step = steps  # also where a restart has found no step left
            records: list[Record | BlockRecord] = []
            certificates["trained_equals_frozen"] = _unchanged(
                context,
                model,
                rows,
                lambda model: records.append(rounding.settle(model)),
                SAVED[precision],
                rounding.served,
            )
            also.append(functools.partial(_write_record, context, records[0], SAVED[precision]))
            certificates["weights_bit_equal"] = True  # or `also` raises
            measured["bits_per_weight"] = bits_per_weight(model, records[0], SAVED[precision])
        state = model.state_dict()
    if trainer.is_global_zero and keep_zeros:
        with unsharded():
            certificates["zeros_kept"] = zeros.check_kept(load_plain(), state)
    if trainer.is_global_zero:
        metrics = {
            "parameters": parameters,
            **measured,
            **(extra or {}),
            "data": prepared["statistics"],
            **({"on_policy": rollouts.metrics(steps)} if rollouts else {}),
            "validation": module.validation_metrics or None,
        }
        publish_model(
            context,
            model,
            tokenizer,
            state,
            SAVED[precision],
            metrics,
            tokens=module.tokens_seen,
            steps=steps,
            seconds=module.seconds_spent,
            certificates=certificates,
            also=also,
        )
    trainer.strategy.barrier()


def _write_record(context: Context, record: Record | BlockRecord, saved: torch.dtype, folder: Path) -> None:
    """Beside a model that was written; its weights are read again, and held against it."""
    record.write(folder / artifact.GRID)
    with unsharded():
        check_held(load_model(str(folder), dtype=saved), open_record(folder / artifact.GRID), saved, context.stage)


@torch.no_grad()
def _unchanged(
    context: Context,
    model: Any,
    rows: Rows,
    change: Callable[[Any], object],
    saved: torch.dtype,
    served: Callable[[Any], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:
    """`change` a trained model in place into the plain one that is saved, and measure on text what that changed, in
    float32 and in the dtype that is saved, the plain one as it is `served`. Raises Refusal where it is more than
    float32's rounding."""
    numbers = range(min(_PROOF_ROWS, len(rows.train)))
    batch = collate([rows.train[number] for number in numbers], pad_token=rows.pad_token)
    words = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    model.eval()
    before = model(**words).logits
    change(model)
    with served(model):
        after = model(**words).logits
    real = batch["targets"] >= 0
    apart, largest = float((after - before)[real].abs().max()), float(before[real].abs().max())
    if not apart <= _MERGED_TOLERANCE * largest:
        raise Refusal(
            f"{context.stage}: what is saved gives logits that differ by {apart:.1e} from what was trained, of "
            f"{largest:.1e} at most; nothing was written"
        )
    proof = {"max_difference": apart, "largest_logit": largest, "tolerance": _MERGED_TOLERANCE * largest}
    if saved != torch.float32:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(saved))
        with served(model):
            proof["max_difference_saved"] = float((model(**words).logits - before)[real].abs().max())
    return proof


def last_checkpoint(folder: Path, sharded: bool, world: int) -> str | None:
    """The newest whole checkpoint, or None; refuses one that this topology cannot open."""
    found = sorted(folder.glob("step-*.ckpt"))
    if not found:
        return None
    saved_by = len(list(found[-1].glob("checkpoint/*optim_states.pt")))  # ZeRO saves a folder, a file for every rank
    if found[-1].is_dir() != sharded or (sharded and saved_by != world):
        how = f"{saved_by} ranks under ZeRO" if found[-1].is_dir() else "strategy=single or ddp"
        raise Refusal(
            f"{found[-1]} was saved by {how}, and this is {world} ranks {'under ZeRO' if sharded else 'without'}; go "
            f"on with the old strategy and devices, or remove {folder} to start the stage anew"
        )
    return str(found[-1])


def publish_model(
    context: Context,
    model: Any,
    tokenizer: Any,
    state: dict[str, Any],
    dtype: torch.dtype,
    metrics: dict[str, Any],
    *,
    tokens: int,
    steps: int,
    seconds: float,
    certificates: dict[str, Any],
    also: Sequence[Callable[[Path], None]] = (),
) -> None:
    def build(folder: Path) -> None:
        save_model(model, tokenizer, folder, state, dtype)
        for write in also:
            write(folder)
        recorded = context.work / artifact.METRICS
        if recorded.exists():
            shutil.copy(recorded, folder / artifact.METRICS)

    artifact.publish(
        context.out,
        build,
        {
            **context.manifest("model"),
            "tokens": tokens,
            "steps": steps,
            "seconds": round(seconds, 3),
            "metrics": metrics,
            "certificates": certificates,
        },
    )


def _logger(context: Context) -> Any:
    if context.config["logger"] is None or context.rank != 0:
        return False
    make = instantiate(context.config["logger"])
    return make(
        stage=context.stage,
        run_name=context.config["name"],
        folder=context.run_dir / "logs" / context.stage,
        config=context.config,
        restart=context.restart,
    )


def _callbacks(context: Context) -> list[pl.Callback]:
    """Hydra introduces the witnesses; each takes what it wants of these words."""
    words = {"stage": context.stage, "path": context.work / artifact.METRICS, "folder": context.work / "checkpoints"}
    made = []
    for node in context.config["callbacks"].values():
        if node is None:
            continue
        make = instantiate(node, _partial_=True)
        wanted = inspect.signature(make.func).parameters
        made.append(make(**{name: value for name, value in words.items() if name in wanted}))
    return made
