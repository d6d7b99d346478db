"""The teacher in the student's process."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import Refusal
from models.generation import Answer, Sampling, generate, log_probabilities
from models.heads import check_split, head_of, hidden_states, through_head
from models.load import DTYPES, load_model
from models.objectives.representation import Wanted
from models.objectives.signal import Signal
from models.objectives.term import Objective
from models.teachers.teacher import Looked, Opening, Prefix, Result, Source, Teacher, look_through, prefix_of, signal_of

PACKED = ("int8", "nf4")


@dataclass(frozen=True)
class Online(Source):
    """Frozen, without graph, its head handed to the engine instead of logits.

    Under ZeRO-3 it is sharded by the student's engine. It is in no checkpoint and in no optimizer.
    """

    path: str
    dtype: str = "float32"
    trust_remote_code: bool = False
    weights: str | None = None  # of PACKED: the layers' matrices in fewer bits than dtype, by bitsandbytes

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"teacher.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if self.weights is not None and self.weights not in PACKED:
            raise Refusal(f"teacher.weights={self.weights}: need one of {', '.join(PACKED)}, or null")
        if self.weights is not None and importlib.util.find_spec("bitsandbytes") is None:
            raise Refusal(
                f"teacher.weights={self.weights}: bitsandbytes is not installed; pip install 'bitsandbytes>=0.50'"
            )

    @property
    def packed_weights(self) -> str | None:
        return self.weights

    def check(self, objective: Objective) -> None:
        """It serves all of them."""

    def open(self, opening: Opening) -> Teacher:
        model = load_model(
            self.path,
            dtype=DTYPES[self.dtype],
            attention=opening.attention,
            role="teacher",
            trust_remote_code=self.trust_remote_code,
            device=opening.device,
            **({} if self.weights is None else _packing(self.weights, DTYPES[self.dtype], opening.device)),
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # It would rearrange its bits in place, which not all widths survive.
                module.support_avx512bf16_for_cpu = False
        return Resident(model.eval().requires_grad_(False), opening)


def _packing(weights: str, compute: torch.dtype, device: str) -> dict[str, Any]:
    """For from_pretrained: matrices are packed one by one as they are read, so that the whole model is never in memory
    (LLM.int8, arXiv:2208.07339; NF4, arXiv:2305.14314). Embeddings and head stay as they are."""
    from transformers import BitsAndBytesConfig

    if weights == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    place = torch.cuda.current_device() if device == "cuda" else device
    return {"quantization_config": config, "device_map": {"": place}}


class Resident(nn.Module):
    """A model that lives where the student does, as a module beside it."""

    def __init__(self, model: Any, opening: Opening) -> None:
        super().__init__()
        self.model, self.opening = model, opening
        self.prefix: Prefix | None = None

    def check(self) -> None:
        self.eval()
        check_split(self.model, self.opening.vocabulary, self.opening.packed)
        self.prefix = prefix_of(self.opening, self._run, self.model)

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        return look_through(self.model, self._run, batch, wanted, self.prefix)

    def _run(self, ids: Tensor, positions: Tensor, past: Any) -> Tensor:
        return hidden_states(self.model, ids, positions, past)

    def give(self, looked: Looked, work: Callable[[Signal], Result]) -> Result:
        # Its head is whole only inside the head's own forward. The result leaves by the side door: as that forward's
        # result, ZeRO-3 would take it for the teacher's and gather its weight for the backward.
        assert looked.hidden is not None
        results: list[Result] = []
        through_head(
            self.model,
            looked.hidden,
            lambda _: results.append(work(signal_of(looked, head_of(self.model), self.opening))),
        )
        return results[0]

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **words: Any
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As models.generation.generate; under a ZeRO-3 student's engine with synced=True."""
        return generate(self.model, prompts, sampling, **words)

    def log_probabilities(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **words: Any
    ) -> list[list[float]]:
        """As models.generation.log_probabilities."""
        return log_probabilities(self.model, pairs, **words)

    def close(self) -> None:
        """It goes with the module it is part of, whose engine may still hold its shards."""
