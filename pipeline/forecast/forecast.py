"""The forecast of a run: a row for each stage, and what to change where one does not fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from models.load import DTYPES, empty_model, parameter_count
from models.tracing.reading import read, write
from models.tracing.step import ENGINE
from pipeline.context import Context
from pipeline.data.flat import bytes_a_token
from pipeline.forecast.memory import PARTS, Held
from pipeline.forecast.payoff import verdict
from pipeline.forecast.place import Place
from pipeline.forecast.traces import RECORDED, Traces
from pipeline.forecast.training import Training, offloads, strategy_name
from pipeline.forecast.workload import Reads, Trains, Workload, Writes
from pipeline.report.units import size
from pipeline.training.strategy import ZeRO

Json = dict[str, Any]


def forecast_of(context: Context, workload: Workload) -> Json:
    """A row: bytes, operations, seconds and GPU-hours of a stage, and `notes` in sentences."""
    place = Place.of(context.config["forecast"], context.world)
    if isinstance(workload, Trains):
        row = _trains(context, workload, place)
    else:
        row = _reads(workload, place) if isinstance(workload, Reads) else _writes(workload, place)
    on_a_node = min(row["gpus"], place.ranks_of_a_node)
    return {"stage": context.stage, **row, "node_host_bytes": row["host_bytes"] * on_a_node}


def _trains(context: Context, trains: Trains, place: Place) -> Json:
    trainer = context.config["trainer"]
    if isinstance(context.strategy, ZeRO):
        context.strategy.check("cuda" if place.cuda else "cpu", place.gpus)
    memory_mb = trainer["objective_memory_mb"]
    recorded = (context.config["encoding"] or {}).get("k", RECORDED)
    traces = Traces(trains, "cuda" if place.cuda else "cpu", None if memory_mb is None else memory_mb * 2**20, recorded)
    name = strategy_name(context.config["strategy"], context.strategy)
    stage = Training(trains, traces, place, context.strategy, name)
    held, training = stage.configured, trains.recipe.training
    parameters = parameter_count(empty_model(trains.student))
    row = {
        "parameters": parameters,
        "strategy": name,
        "micro_batch": training.micro_batch,
        "gpus": place.gpus,
        **_memory(held, place),
        "loss_bytes": stage.step.forward[ENGINE],
        "host_bytes": held.host + _loading(stage, place),
        **_disk(trains, parameters, stage.tokens, trainer["checkpoint"]["keep"]),
        **_time(stage.tokens, stage.flops_per_token, place, trains.recipe.precision),
        "largest_micro_batch": stage.largest(context.strategy),
    }
    if trains.recipe.on_policy is not None:
        row |= _rollouts(trains, stage, place)
    best = stage.best()
    row["choose"] = None if best is None else {"strategy": best.strategy, "micro_batch": best.micro_batch}
    return {**row, "notes": _notes(context, stage, row)}


def _memory(held: Held, place: Place) -> Json:
    return {
        "device_bytes": held.total,
        "usable_bytes": None if place.gpu is None else int(place.usable_bytes),
        "reading_bytes": held.reading,
        "fits": held.peak <= place.usable_bytes,
        **{f"{part}_bytes": held.device.get(part, 0) for part in PARTS},
    }


def _loading(stage: Training, place: Place) -> int:
    """Of a rank, in the host's memory: under ZeRO-3 its share of what is read, the start in fp32; else, on GPUs, what
    is to be packed in NF4, as the rest goes straight to them. Or, where that is more, its copy of a checkpoint that is
    written while training goes on."""
    recipe, student = stage.trains.recipe, parameter_count(empty_model(stage.trains.student))
    start, teacher = 4 * student, stage.traces.teacher("float32").bytes
    if isinstance(stage.strategy, ZeRO) and stage.strategy.stage == 3:
        read = math.ceil((start + teacher) / place.gpus)
    elif place.cuda:
        read = 0 if recipe.lora is None or recipe.lora.base is None else start
    else:
        read = start + teacher
    trained = student if recipe.lora is None else recipe.lora.parameters(empty_model(stage.trains.student))
    return max(read, math.ceil(12 * trained / place.gpus))


def _disk(trains: Trains, parameters: int, tokens: int | None, keep: int) -> Json:
    """As pipeline.training.settings.check_disk counts it: weights and two moments of what is trained, in fp32."""
    lora = trains.recipe.lora
    trained = parameters if lora is None else lora.parameters(empty_model(trains.student))
    vocabulary = trains.student.get_text_config().vocab_size
    return {
        "checkpoint_bytes": 12 * trained * keep,
        "result_bytes": parameters * trains.recipe.saved.itemsize,
        "data_bytes": None if tokens is None else bytes_a_token(vocabulary) * tokens,
    }


def _time(tokens: int | None, flops_per_token: float, place: Place, precision: str) -> Json:
    rate = place.rate(precision)
    speed = None if rate is None else rate / flops_per_token
    seconds = None if speed is None or tokens is None else tokens / speed
    return {
        "tokens": tokens,
        "flops": None if tokens is None else tokens * flops_per_token,
        "flops_per_token": flops_per_token,
        "tokens_per_second": speed,
        "seconds": seconds,
        "gpu_hours": None if seconds is None else seconds * place.gpus / 3600,
    }


def _rollouts(trains: Trains, stage: Training, place: Place) -> Json:
    """What a student that writes its own text adds: keys and values, and the time of writing."""
    policy = trains.recipe.on_policy
    assert policy is not None
    new, length = policy.sampling.max_new_tokens, trains.recipe.data.max_length
    prompt = max(1, min(length - new, length))
    width = trains.recipe.saved
    made = write(trains.student, width, policy.batch_size, prompt, new)
    added: Json = {"kv_cache_bytes": made.cache_bytes}
    if (seconds := _writing_seconds(made, policy.batch_size, new, place)) is not None and stage.tokens is not None:
        steps = stage.tokens / (trains.recipe.training.global_batch * length)
        answers = steps * policy.share * trains.recipe.training.global_batch
        added["writing_seconds"] = answers / (policy.batch_size * place.gpus) * seconds
    return added


def _writing_seconds(made: Any, rows: int, new: int, place: Place) -> float | None:
    """Of a batch of answers: every token reads all weights and the cache once; the prompt is computed."""
    if place.gpu is None:
        return None
    moved = new * (made.weight_bytes + made.cache_bytes)
    computed = made.flops / (place.gpu.bfloat16 * place.efficiency)
    return max(moved / place.gpu.bandwidth / place.efficiency, computed)


def _reads(reads: Reads, place: Place) -> Json:
    dtype = DTYPES[reads.dtype]
    made = read(reads.model, dtype, reads.rows, reads.length, reads.backward)
    weights = made.weight_bytes
    if reads.in_layers:
        weights = made.largest_layer_bytes
    elif reads.sharded:
        weights = math.ceil(weights / place.gpus) + made.largest_layer_bytes
    ranks = place.gpus if reads.several else 1
    held = Held({"parameters": weights, "activations": made.work})
    per_token = reads.times * made.flops / (reads.rows * reads.length)
    return {
        "parameters": made.parameters,
        "gpus": ranks,
        "micro_batch": reads.rows,
        **_memory(held, place),
        "host_bytes": made.weight_bytes,
        **_time(reads.tokens, per_token, _with(place, ranks), reads.dtype),
        "notes": [] if held.total <= place.usable_bytes else [_too_large(held, place, "a smaller batch_size")],
    }


def _writes(writes: Writes, place: Place) -> Json:
    made = write(writes.model, DTYPES[writes.dtype], writes.rows, writes.prompt, writes.new)
    weights = (
        math.ceil(made.weight_bytes / place.gpus) + made.largest_layer_bytes if writes.sharded else made.weight_bytes
    )
    held = Held({"parameters": weights, "activations": made.work, "buffers": made.cache_bytes})
    seconds = _writing_seconds(made, writes.rows, writes.new, place)
    total = None
    if seconds is not None and writes.answers is not None:
        total = writes.answers / (writes.rows * place.gpus) * seconds
    return {
        "parameters": made.parameters,
        "gpus": place.gpus,
        "micro_batch": writes.rows,
        **_memory(held, place),
        "kv_cache_bytes": made.cache_bytes,
        "buffers_bytes": 0,
        "host_bytes": made.weight_bytes,
        "tokens": None if writes.answers is None else writes.answers * writes.new,
        "tokens_per_second": None if seconds is None else writes.rows * writes.new * place.gpus / seconds,
        "seconds": total,
        "gpu_hours": None if total is None else total * place.gpus / 3600,
        "notes": [] if held.total <= place.usable_bytes else [_too_large(held, place, "a smaller batch_size")],
    }


def _with(place: Place, gpus: int) -> Place:
    return replace(place, gpus=gpus)


def _too_large(held: Held, place: Place, remedy: str) -> str:
    return (
        f"does not fit: {size(held.total)} of {size(place.usable_bytes)}; take {remedy}, teacher=sharded, or GPUs with "
        f"more memory"
    )


def _notes(context: Context, stage: Training, row: Json) -> list[str]:
    """What to change, and whether it pays."""
    trains, place = stage.trains, stage.place
    training = trains.recipe.training
    notes = []
    if training.global_batch % (training.micro_batch * place.gpus):
        notes.append(
            f"global_batch={training.global_batch} cannot be divided over {place.gpus} GPUs in micro-batches of "
            f"{training.micro_batch}: the command would be refused; set "
            f"stages.{context.stage}.training.global_batch to a multiple of {training.micro_batch * place.gpus}"
        )
    if place.gpus > 1 and not stage.strategy.several_ranks:
        notes.append(
            f"strategy={stage.name} runs one process, and time is told of {place.gpus}: the command would be "
            f"refused; set strategy=ddp, zero2 or zero3"
        )
    if stage.packed is not None and stage.strategy.shards_parameters:
        notes.append(
            f"{stage.packed} under strategy={stage.name}: packed weights are not sharded, and the command would be "
            f"refused; use strategy=zero2, for which these figures are not"
        )
    if not row["fits"]:
        notes.append(_what_would(stage, row))
    elif row["choose"] and row["choose"]["strategy"] != stage.name and place.cuda and not offloads(stage.strategy):
        notes.append(f"strategy={row['choose']['strategy']} fits too, and has less to send between GPUs")
    if (most := row["largest_micro_batch"]) and most > training.micro_batch and place.cuda:
        notes.append(f"the largest micro-batch that fits is {most}: stages.{context.stage}.training.micro_batch={most}")
    if stage.tokens is None:
        notes.append("its length is known only when the text is read: set max_tokens or max_steps for hours")
    if trains.recipe.teacher is not None:
        cost = stage.flops_per_token / stage.flops_without_teacher
        notes.append(
            verdict(
                student=row["parameters"],
                tokens=stage.tokens,
                made_here=trains.made_here,
                fresh=trains.fresh,
                cost=cost,
            )
        )
    return notes


def _what_would(stage: Training, row: Json) -> str:
    held, reading = row["device_bytes"], row["reading_bytes"]
    told = f"does not fit: {size(max(held, reading))} of {size(row['usable_bytes'])} with strategy={stage.name}"
    if reading > held:
        told += ", while weights are read in fp32"
    ways = []
    if (most := row["largest_micro_batch"]) is not None:
        ways.append(f"micro_batch={most}")
    if (best := stage.best()) is not None and best.strategy != stage.name:
        ways.append(f"strategy={best.strategy} with micro_batch={best.micro_batch}")
    if best is None and (more := stage.more_gpus()) is not None:
        ways.append(f"{more.gpus} GPUs with strategy=zero3 and micro_batch=1")
    if not ways:
        ways.append("GPUs with more memory, activation_checkpointing=true, or a shorter data.max_length")
    return f"{told}; what fits: {', or '.join(ways)}"
