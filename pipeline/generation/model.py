"""Answers of a teacher that runs here, on every rank."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch

from models.errors import Refusal
from models.generation import Sampling
from models.load import DTYPES, attention_for
from models.teachers.teacher import Author, Opening, Source
from pipeline.context import Context
from pipeline.data.batch import pad_token
from pipeline.generation.request import Request, places_of
from pipeline.progress import shown
from pipeline.training.ranks import beat, join, watch
from pipeline.training.strategy import prepare_environment


def answered_here(context: Context, source: Source, request: Request, batch_size: int) -> int:
    """Tokens made by this rank."""
    prepare_environment(context.device)
    world, rank = context.world, context.rank
    place = join(context) if world > 1 else torch.device(context.device)
    if not request.todo:  # other filters, or fewer prompts: all answers are there
        return 0
    teacher = _opened(context, source, len(request.tokenizer))
    if isinstance(teacher, torch.nn.Module):
        teacher.to(place)
    units = units_of(request.prompts, request.sampling, batch_size)
    open_units = [unit for unit in units if any(key in request.todo for key in unit)]
    made = 0
    with torch.no_grad():
        teacher.check()  # which reads a sharded one
        watch(context, teacher)
        # As many batches on every rank: a sharded teacher takes all of them for every forward.
        rounds = -(-len(open_units) // world)
        for round_ in shown(range(rounds), rounds, "generating", rank == 0):
            mine = round_ * world + rank < len(open_units)
            unit = open_units[round_ * world + rank if mine else 0]
            found = _answers(context, teacher, source, request, unit, batch_size)
            if mine:
                for at, (number, answer, log) in enumerate(found):
                    request.shards.add(unit[number], at % request.sampling.samples, answer, log)
                    made += len(answer.ids)
                request.shards.flush_where_due()
            beat()
    teacher.close()
    return made


def _opened(context: Context, source: Source, vocabulary: int) -> Author:
    attention = attention_for("auto", context.device, DTYPES[source.dtype])
    opened = source.asked_once().open(Opening(vocabulary, attention, packed=False, device=context.device))
    if not isinstance(opened, Author):
        raise Refusal(f"{context.stage}: this teacher writes no answers; use teacher=online or teacher=sharded")
    return opened


def _answers(
    context: Context, teacher: Author, source: Source, request: Request, unit: list[str], batch_size: int
) -> list[tuple[int, Any, list[float]]]:
    """(number of the prompt in `unit`, answer, log-probabilities of its tokens), sample by sample."""
    tokenizer = request.tokenizer
    words = {"pad_token": pad_token(tokenizer), "batch_size": batch_size}
    ids = [request.ids(key) for key in unit]
    ends = {"end_tokens": request.end_tokens, "stop": request.stop, "tokenizer": tokenizer}
    answers = dict(teacher.generate(ids, request.sampling, **ends, **words))
    flat = [(number, answer) for number in range(len(unit)) for answer in answers[number]]
    pairs = [(ids[number], answer.ids) for number, answer in flat]
    log_probabilities = teacher.log_probabilities(pairs, vocabulary=len(tokenizer), **words)
    if not all(math.isfinite(value) for values in log_probabilities for value in values):
        raise Refusal(
            f"{context.stage}: the teacher's log-probabilities are no numbers in {source.dtype}; set "
            f"teacher.dtype=float32, or see to its weights"
        )
    return [(*answer, log) for answer, log in zip(flat, log_probabilities, strict=True)]


def units_of(prompts: pa.Table, sampling: Sampling, batch_size: int) -> list[list[str]]:
    """The provenances of prompts that are answered together, of similar length, the longest first.

    The same ones whatever is left to do and however many ranks and jobs there are, so that all round as an
    uninterrupted run on one rank does.
    """
    places = places_of(prompts)
    lengths = pc.list_value_length(prompts["teacher_ids"]).to_pylist()
    order = sorted(places, key=lambda key: (-lengths[places[key]], places[key]))
    size = max(1, batch_size // (sampling.samples * sampling.beams))
    return [order[at : at + size] for at in range(0, len(order), size)]
