"""The contract of an encoding: what of a teacher's signal is written to disk, and what training makes of it.

Legend: N supervised tokens of a piece, V vocabulary, H the teacher's hidden width, K tokens kept.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import Refusal
from models.objectives.head import Head
from models.objectives.signal import Signal

Payload = dict[str, Tensor]  # of one piece or of many after one another; every tensor's first dimension is concatenated


class Encoding(ABC):
    name: ClassVar[str]  # of its module in models/teachers/encodings
    keeps_head: ClassVar[bool] = False  # whether the teacher's head is needed to read it

    @property
    def measured_at(self) -> Sequence[float]:
        """The temperatures at which its fidelity is reported."""
        return [1.0]

    def of_server(self, top_k: int) -> Encoding:
        """What is kept of a server, which gives the log-probabilities of its `top_k` best tokens at temperature 1, and
        nothing else: a TopK. Raises Refusal where that cannot stand for this encoding."""
        raise Refusal(
            f"encoding={self.name}: a server gives the best k tokens alone; use encoding=top_k and "
            f"teacher.endpoint.top_k"
        )

    @abstractmethod
    def encode(self, hidden_NH: Float[Tensor, "N H"], head: Head, seed: int) -> Payload:
        """One piece. `head` is restricted to the shared vocabulary; chance draws from `seed` alone."""

    @abstractmethod
    def signal(self, payload: Payload, head: Head | None) -> Signal:
        """Of pieces that were concatenated, on the device training runs on."""

    @abstractmethod
    def refusal(self, term: Any) -> str | None:
        """Why an objective's term cannot be worked out from this encoding, or None."""


def open_encoding(told: dict[str, Any]) -> Encoding:
    """The encoding that `describe` described. Only a module of this folder can be named."""
    name = str(told.get("name"))
    if not re.fullmatch(r"[a-z_]+", name):
        raise Refusal(f"encoding {name}: no such encoding")
    try:
        module = import_module(f"models.teachers.encodings.{name}")
        kind = next(each for each in vars(module).values() if _is_encoding(each) and each.name == name)
    except (ImportError, StopIteration):
        raise Refusal(f"encoding {name}: no such encoding; it needs a newer Retort") from None
    made: Encoding = kind(**told["settings"])
    return made


def _is_encoding(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Encoding) and value is not Encoding


def describe(encoding: Any) -> dict[str, Any]:
    return {"name": encoding.name, "settings": asdict(encoding)}


def in_chunks(hidden_NH: Float[Tensor, "N H"], head: Head, wide: torch.dtype) -> Any:
    """Logits of some tokens at a time: [n, V]."""
    rows = max(1, 2**25 // len(head.weight))
    for hidden_nH in hidden_NH.split(rows):
        yield head.logits(hidden_nH.to(head.weight.dtype), wide)


def wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
