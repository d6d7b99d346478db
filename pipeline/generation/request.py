"""What is asked of a teacher: the prompts that have been written, and the answers that are still to be made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from transformers import GenerationConfig

from models.generation import Sampling, listed_ends
from pipeline.data.answer_shards import Shards
from pipeline.data.controls import Controls
from pipeline.data.frames import controls_of


@dataclass(frozen=True)
class Request:
    prompts: pa.Table  # in the order of the splits
    todo: dict[str, list[int]]  # provenance → samples that are still to be made
    tokenizer: Any
    sampling: Sampling
    stop: list[str]  # texts that end an answer, beside the end tokens
    end_tokens: list[int]
    shards: Shards  # where answers go

    @cached_property
    def places(self) -> dict[str, int]:
        return places_of(self.prompts)

    @cached_property
    def controls(self) -> Controls:
        return controls_of(self.tokenizer)

    def ids(self, key: str) -> list[int]:
        """What the teacher reads."""
        read: list[int] = self.prompts["teacher_ids"][self.places[key]].as_py()
        return read


def places_of(prompts: pa.Table) -> dict[str, int]:
    """Each provenance's first prompt."""
    found: dict[str, int] = {}
    for number, key in enumerate(prompts["provenance"].to_pylist()):
        found.setdefault(key, number)
    return found


def provenance(header: str, teacher_ids: Sequence[int]) -> str:
    """Of an answer: what it was made of and how, but for which sample it is. `header`: all that decides an answer
    beside its prompt."""
    return hashlib.sha256(json.dumps([header, list(teacher_ids)]).encode()).hexdigest()[:32]


def end_tokens(path: str, tokenizer: Any, config: Any) -> list[int]:
    """What ends the teacher's answers: its tokenizer's end token first, and those its generation config names."""
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        named = getattr(config, "eos_token_id", None)
    return listed_ends(named, first=tokenizer.eos_token_id)
