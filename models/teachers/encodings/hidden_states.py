"""The teacher's last hidden states, with its head kept once: exact over the whole vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import Refusal
from models.objectives import signal
from models.objectives.head import Head
from models.teachers.encodings.encoding import Encoding, Payload


@dataclass(frozen=True)
class HiddenStates(Encoding):
    """In the teacher's own dtype nothing is lost; int8 has one scale a token, and a quarter to half the bytes.

    Every divergence at every temperature can be worked out from it; the product with the teacher's head is left to
    training.
    """

    dtype: str | None = None  # the teacher's own
    name: ClassVar[str] = "hidden_states"
    keeps_head: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.dtype not in (None, "bfloat16", "float16", "int8", "float32"):
            raise Refusal(f"encoding.dtype={self.dtype}: need bfloat16, float16, int8, float32, or null: the teacher's")

    def encode(self, hidden_NH: Float[Tensor, "N H"], head: Head, seed: int) -> Payload:
        if self.dtype != "int8":
            exact = hidden_NH.dtype == torch.float64 and self.dtype == "float32"
            kept = self.dtype is None or exact
            return {"hidden": hidden_NH if kept else hidden_NH.to(getattr(torch, str(self.dtype)))}
        scale_N = hidden_NH.float().abs().amax(-1).clamp_min(1e-30) / 127
        return {"hidden": (hidden_NH.float() / scale_N[:, None]).round().to(torch.int8), "scale": scale_N}

    def signal(self, payload: Payload, head: Head | None) -> signal.Signal:
        assert head is not None
        hidden_NH = payload["hidden"]
        if "scale" in payload:
            hidden_NH = hidden_NH.float() * payload["scale"][:, None]
        return _Recorded(signal.Dense(hidden_NH.to(head.weight.dtype), head))

    def refusal(self, term: Any) -> str | None:
        return None


@dataclass(frozen=True)
class _Recorded:
    """A dense signal of the supervised tokens alone."""

    dense: signal.Dense

    def at(self, supervised_N: Tensor, vocabulary: int | None, like: Tensor, wide: torch.dtype) -> signal.Look:
        if len(supervised_N) != len(self.dense.hidden):
            raise ValueError(
                f"the teacher's signal covers {len(self.dense.hidden)} tokens, and {len(supervised_N)} are supervised"
            )
        everywhere = torch.arange(len(supervised_N), device=supervised_N.device)
        return self.dense.at(everywhere, vocabulary, like, wide)
