"""Where the teacher's signal comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.errors import Refusal
from models.heads import hidden_states
from models.load import DTYPES, load_model


@dataclass(frozen=True)
class Online:
    """The teacher in the student's process: frozen, without graph, its head handed to the engine instead of logits.

    Under ZeRO-3 it is sharded by the student's engine. It is in no checkpoint and in no optimizer.
    """

    path: str
    dtype: str = "float32"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"teacher.dtype={self.dtype}: need one of {', '.join(DTYPES)}")

    def load(self, attention: str | None) -> nn.Module:
        model = load_model(
            self.path,
            dtype=DTYPES[self.dtype],
            attention=attention,
            role="teacher",
            trust_remote_code=self.trust_remote_code,
        )
        return model.eval().requires_grad_(False)


@torch.no_grad()
def signal(teacher: Any, input_ids: Int[Tensor, "B T"], position_ids: Int[Tensor, "B T"]) -> Float[Tensor, "B T H"]:
    """The teacher's hidden states on the student's own tokens; with its head they are its logits."""
    return hidden_states(teacher, input_ids, position_ids)
