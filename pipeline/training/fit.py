"""The one place that makes a LanguageModel and a Trainer, and calls Trainer.fit. It runs on every rank."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from models.generation import end_tokens
from models.load import attention_for, empty_model, load_config
from models.objectives.term import needs_teacher
from models.teachers.teacher import Opening
from models.training.costs import Arithmetic, Forward
from models.training.language_model import LanguageModel
from models.training.on_policy import OnPolicy
from models.training.rollouts import Rollouts, ends_of
from pipeline.context import Context, left_at
from pipeline.data.batch import collate, pad_token
from pipeline.data.loader import PackedSequences, accumulation
from pipeline.data.sequences import Sequences
from pipeline.data.token_bytes import vocabulary_pairs
from pipeline.data.tokenizer import load_tokenizer
from pipeline.training.observers import callbacks_of, logger_of
from pipeline.training.prepare import Prepared
from pipeline.training.recipe import Recipe
from pipeline.training.settings import check_nvme
from pipeline.training.strategy import prepare_environment
from pipeline.training.student import Student


@dataclass(frozen=True)
class Fitted:
    """A training run that is over, still in memory."""

    trainer: pl.Trainer
    module: LanguageModel
    student: Student
    sequences: PackedSequences
    tokenizer: Any
    prepared: Prepared
    rollouts: Rollouts | None
    steps: int


def fit(context: Context, recipe: Recipe) -> Fitted:
    """Train `<work>/start` on the prepared text."""
    prepared = Prepared.read(context.work)
    prepare_environment(context.device)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)  # it sets itself to INFO when imported
    tokenizer = load_tokenizer(prepared.start)
    attention = attention_for(context.config["trainer"]["attention"], context.device, recipe.saved)
    sequences = _sequences(context, recipe, prepared, tokenizer)
    student = Student.read(prepared.start, recipe, context.seed, attention)
    trained = student.parameters if recipe.lora is None else recipe.lora.parameters(empty_model(student.config))
    check_nvme(context, trained, recipe.teacher)
    training = recipe.training
    steps = sequences.steps(max_steps=training.max_steps, max_tokens=training.max_tokens, epochs=training.epochs)
    _tell_not_read(context, sequences, steps, recipe.on_policy)
    opening = _opening(context, recipe, prepared, tokenizer, attention)
    rollouts = _rollouts(context, recipe, sequences, student, tokenizer)
    checkpoint = Path(prepared.checkpoint) if prepared.checkpoint else None
    module = _module(context, recipe, student, opening, rollouts, steps, len(tokenizer), checkpoint)
    trainer = _trainer(context, recipe, steps, validates=sequences.validation is not None)
    trainer.fit(module, datamodule=sequences)
    return Fitted(trainer, module, student, sequences, tokenizer, prepared, rollouts, steps)


def _sequences(context: Context, recipe: Recipe, prepared: Prepared, tokenizer: Any) -> PackedSequences:
    data, training = recipe.data, recipe.training
    validation = Sequences(prepared.validation) if prepared.validation else None
    if validation is not None and data.validation_sequences is not None and len(validation) > data.validation_sequences:
        validation = validation.select(np.linspace(0, len(validation) - 1, data.validation_sequences, dtype=int))
    return PackedSequences(
        Sequences(prepared.train),
        validation,
        seed=context.seed,
        global_batch=training.global_batch,
        micro_batch=training.micro_batch,
        pad_token=pad_token(tokenizer),
        length=data.max_length if data.packing else None,
        workers=training.workers,
        skipped=context.skipped,
    )


def _tell_not_read(context: Context, sequences: PackedSequences, steps: int, on_policy: OnPolicy | None) -> None:
    """Say of each turn which of its skipped sequences are not read from its step on, here and in the manifest: that
    they were left out changed nothing."""
    if on_policy is not None and on_policy.replay_capacity:  # answers to earlier prompts are read once more
        return
    order = sequences.order()
    for at, turn in enumerate(context.turns):
        if left_at(context.turns, at) is not None:
            continue
        if not (idle := sorted({*turn["skipped"]} - order.read_between(turn["skipped"], turn["step"], steps))):
            continue
        turn["not_read"] = idle
        if context.rank == 0:
            print(
                f"{context.stage}: resume.skip_sequences={idle}: not read from step {turn['step']} to the end at step "
                f"{steps}, so that leaving them out changes nothing",
                flush=True,
            )


def _opening(context: Context, recipe: Recipe, prepared: Prepared, tokenizer: Any, attention: str | None) -> Opening:
    teacher, vocabulary, pairs = recipe.teacher, len(tokenizer), None
    if recipe.align and teacher is not None:
        other = load_tokenizer(teacher.path, teacher.trust_remote_code)
        vocabulary = len(other)
        students, teachers = vocabulary_pairs(tokenizer, other)
        pairs = (torch.from_numpy(students), torch.from_numpy(teachers))
    # Several prompts of the teacher's stand in one sequence, whatever the student's do.
    packed = recipe.data.packing or recipe.data.teacher_prompts > 1
    return Opening(vocabulary, attention, packed, pairs, prepared.prefix, context.device)


def _rollouts(
    context: Context, recipe: Recipe, sequences: PackedSequences, student: Student, tokenizer: Any
) -> Rollouts | None:
    if recipe.on_policy is None:
        return None
    ends = {*end_tokens(tokenizer, student.named_ends), *ends_of(sequences.train)}
    return Rollouts(
        recipe.on_policy,
        examples=sequences.train,
        step_examples=sequences.order().step_sequences,
        collate=functools.partial(collate, pad_token=sequences.pad_token),
        load_student=student.load,
        seed=context.seed,
        pad_token=sequences.pad_token,
        end_tokens=sorted(ends),
        stop=recipe.data.stops,
        tokenizer=tokenizer,
        skipped=sequences.skipped,
    )


def _arithmetic(recipe: Recipe, student: Student, opening: Opening) -> Arithmetic | None:
    """None where it cannot be told from the batches: of text that the student writes, of a shared prompt that is read
    once, and of a teacher whose code is its own."""
    teacher, asked = recipe.teacher, None
    here = teacher is not None and needs_teacher(recipe.objective) and teacher.runs_here and not teacher.needs_record
    if recipe.on_policy is not None or opening.prefix or (here and teacher is not None and teacher.trust_remote_code):
        return None
    trained = Forward.of(student.config)
    if teacher is not None and here and (asked := Forward.of(load_config(teacher.path, "teacher"))) is None:
        return None
    return None if trained is None else Arithmetic(trained, recipe.lora is not None, asked)


def _module(
    context: Context,
    recipe: Recipe,
    student: Student,
    opening: Opening,
    rollouts: Rollouts | None,
    steps: int,
    vocabulary: int,
    checkpoint: Path | None,
) -> LanguageModel:
    settings, training, teacher = context.config["trainer"], recipe.training, recipe.teacher
    configs = None
    if teacher is not None and recipe.objective.representations:
        configs = (student.config, load_config(teacher.path, "teacher", teacher.trust_remote_code))
    memory_mb = settings["objective_memory_mb"]
    return LanguageModel(
        load_student=functools.partial(student.load, context.device),
        load_teacher=None if teacher is None else lambda: teacher.open(opening),
        objective=recipe.objective,
        optimizer=training.optimizer,
        schedule=training.schedule,
        weight_decay=training.weight_decay,
        max_steps=steps,
        vocabulary=vocabulary,
        packed=recipe.data.packing,
        seed=context.seed,
        log_every_steps=settings["log_every_steps"],
        activation_checkpointing=training.activation_checkpointing,
        configs=configs,
        memory_bytes=None if memory_mb is None else memory_mb * 2**20,
        compiled=settings["compile"],
        on_policy=rollouts,
        rounding=student.rounding,
        checkpoint=checkpoint,
        arithmetic=_arithmetic(recipe, student, opening),
    )


def _trainer(context: Context, recipe: Recipe, steps: int, validates: bool) -> pl.Trainer:
    settings, training = context.config["trainer"], recipe.training
    micro_batches = accumulation(training.global_batch, training.micro_batch, context.world)
    return pl.Trainer(
        accelerator=context.device,
        devices=context.devices,
        num_nodes=settings["nodes"],
        precision=recipe.precision,
        strategy=context.strategy.lightning(context.device),
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        gradient_clip_val=training.gradient_clip,
        default_root_dir=context.work,
        # in micro-batches; without a setting, once at the end
        val_check_interval=min(training.validate_every_steps or steps, steps) * micro_batches,
        check_val_every_n_epoch=None,
        limit_val_batches=None if validates else 0,
        num_sanity_val_steps=0,
        logger=logger_of(context),
        callbacks=callbacks_of(context),
        use_distributed_sampler=False,
        inference_mode=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=settings["log_every_steps"],
    )
