"""A model that reads text once, or writes answers, traced without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from models.heads import hidden_states
from models.representations import decoder_layers
from models.tracing.live import Live
from models.tracing.step import TEACHER_WEIGHTS, made, pretended


@dataclass(frozen=True)
class Pass:
    """Bytes and operations of one batch."""

    parameters: int
    weight_bytes: int
    largest_layer_bytes: int
    work: int  # held at the fullest moment beyond weights
    flops: int
    cache_bytes: int = 0  # keys and values, of all rows


def read(config: Any, dtype: torch.dtype, rows: int, length: int, backward: bool = False) -> Pass:
    """Hidden states of a batch; the head runs on a chunk of tokens at a time, whose products are counted."""
    with pretended():
        model = made(config, dtype)
        live, tensors = Live(), [*model.parameters(), *model.buffers()]
        model.train(backward).requires_grad_(backward)
        with live, torch.set_grad_enabled(backward):
            live.hold(tensors, TEACHER_WEIGHTS)
            live.begin()
            ids, positions = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
            hidden = hidden_states(model, ids, positions)
            if backward:
                torch.autograd.grad(hidden.sum(), list(model.get_input_embeddings().parameters()))
        head = 2 * rows * length * model.get_output_embeddings().weight.numel() * (3 if backward else 1)
        return _pass(model, live, int(sum(live.flops.values())) + head)


def write(config: Any, dtype: torch.dtype, rows: int, prompt: int, new: int) -> Pass:
    """`prompt` tokens read at once and `new` ones a token at a time. `work` is of reading the prompts; `flops` are of
    all. The cache is the family's own."""
    from transformers import DynamicCache

    with pretended():
        model = made(config, dtype).eval().requires_grad_(False)
        live, tensors = Live(), [*model.parameters(), *model.buffers()]
        with live, torch.no_grad():
            live.hold(tensors, TEACHER_WEIGHTS)
            live.begin()
            with live.labelled("prompt"):
                cache = DynamicCache(config=model.config)
                model(input_ids=torch.zeros(rows, prompt, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
            held = live.peak["prompt"] + live.peak[""]
            with live.labelled("token"):
                model(input_ids=torch.zeros(rows, 1, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
            kept = sum(each.numel() * each.element_size() for each in _cached(cache))
        of_token = kept / (prompt + 1)
        made_pass = _pass(model, live, int(live.flops["prompt"] + new * live.flops["token"]))
        cached = int(of_token * (prompt + new))
        return Pass(**{**vars(made_pass), "work": max(0, held - int(of_token * prompt)), "cache_bytes": cached})


def _cached(cache: Any) -> list[torch.Tensor]:
    return [each for layer in cache.layers for each in (layer.keys, layer.values) if each is not None]


def _pass(model: Any, live: Live, flops: int) -> Pass:
    work: Counter[str] = Counter({label: size for label, size in live.peak.items() if label != TEACHER_WEIGHTS})
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in decoder_layers(model)]
    return Pass(
        parameters=sum(p.numel() for p in model.parameters()),
        weight_bytes=sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]),
        largest_layer_bytes=max(layers, default=0),
        work=sum(work.values()),
        flops=flops,
    )
