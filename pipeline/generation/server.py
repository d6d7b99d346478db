"""Answers of a teacher that another program serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from models import seeds
from models.errors import Refusal
from models.generation import Answer
from models.teachers.endpoint import Endpoint
from pipeline.generation.request import Request
from pipeline.progress import shown


def answered_by_server(server: Endpoint, path: str, request: Request) -> int:
    """Tokens made; `path`: of the teacher, for messages. The server draws its own random numbers, from a seed of each
    answer's own."""
    sampling = request.sampling

    def items() -> Iterator[tuple[tuple[str, int], list[int], int]]:
        for key, samples in request.todo.items():
            ids = request.ids(key)
            for sample in samples:
                yield (key, sample), ids, seeds.of_answer(sampling.seed, ids, sample) % 2**31

    count, made = sum(map(len, request.todo.values())), 0
    answers = server.generate(
        items(),
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=request.stop,
    )
    for (key, sample), generation in shown(answers, count, "generating"):
        reason = "length" if generation.finish_reason == "length" else "stop"
        ids = _ids(generation, reason, request)
        if ids and not 0 <= min(ids) <= max(ids) < len(request.tokenizer):
            raise Refusal(
                f"teacher.path={path}: the server answers with token {max(ids)}, and its tokenizer "
                f"has {len(request.tokenizer)}; give the tokenizer of the model that is served"
            )
        # An answer that came to its end by itself is learnt with its end; not all servers report that token.
        ends = request.end_tokens
        if reason == "stop" and not request.stop and ends and (not ids or ids[-1] not in ends):
            ids = [*ids, ends[0]]
        request.shards.add(key, sample, Answer(ids, reason), generation.log_probabilities)
        request.shards.flush_where_due()
        made += len(ids)
    return made


def _ids(generation: Any, reason: str, request: Request) -> list[int]:
    """The answer's tokens, with the stop that ended it."""
    ids: list[int] | None = generation.ids
    text, stops, tokenizer = generation.text, request.stop, request.tokenizer
    stopped = reason == "stop" and bool(stops) and not any(stop in text for stop in stops)
    if ids is None:  # the server reports only text, and of a stop nothing
        controls = request.controls  # which the text does not hold, whatever it spells; a stop may be one
        return controls.ids_of(controls.quote(text) + (stops[0] if stopped else ""))
    if stopped and (not ids or ids[-1] not in request.end_tokens):
        # Most cut the stop off the text, and report its tokens all the same.
        decoded = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if not any(stop in decoded for stop in stops):
            return [*ids, *tokenizer(stops[0], add_special_tokens=False)["input_ids"]]
    return ids
