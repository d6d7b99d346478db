"""The k largest log-probabilities of each token, and what the rest adds up to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import Refusal
from models.objectives import signal, top_k
from models.objectives.buckets import tail_of
from models.objectives.head import Head
from models.teachers.encodings.encoding import Encoding, Payload, in_chunks, wide

DTYPES = {"float16": torch.float16, "float32": torch.float32}
FLOOR = -1e4  # a log-probability that stands for none: 0 · −∞ would be no number


@dataclass(frozen=True)
class TopK(Encoding):
    """Log-probabilities at temperature 1, by the exact normaliser; per temperature the logit of all other tokens.

    Training compares k + 1 categories, the rest being one. That is a true divergence, and for k = V the dense one.
    """

    k: int = 64
    temperatures: list[float] = field(default_factory=lambda: [1.0, 2.0])
    dtype: str = "float16"
    name: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        if self.k < 1:
            raise Refusal(f"encoding.k={self.k}: need at least 1; 64 holds most of what a teacher says")
        if self.dtype not in DTYPES:
            raise Refusal(f"encoding.dtype={self.dtype}: need float16 or float32")
        if not self.temperatures or not all(t > 0 for t in self.temperatures):
            raise Refusal(f"encoding.temperatures={self.temperatures}: need numbers above 0")

    @property
    def measured_at(self) -> list[float]:
        return self.temperatures

    def of_server(self, top_k: int) -> TopK:
        if self.k not in (TopK.k, top_k):  # what nobody has set is no wish
            raise Refusal(f"encoding.k={self.k}: of a server, teacher.endpoint.top_k={top_k} decides; set that one")
        return TopK(top_k, [1.0], self.dtype)

    def encode(self, hidden_NH: Float[Tensor, "N H"], head: Head, seed: int) -> Payload:
        parts = [self.of(logits_nV) for logits_nV in in_chunks(hidden_NH, head, wide(hidden_NH))]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def of(self, logits_NV: Float[Tensor, "N V"]) -> Payload:
        logits_NV = logits_NV - torch.logsumexp(logits_NV, -1, keepdim=True)
        vocabulary = logits_NV.shape[1]
        logits_NK, ids_NK = logits_NV.topk(min(self.k, vocabulary), dim=-1)
        payload = {
            "ids": ids_NK.to(ids_dtype(vocabulary)),
            "logits": logits_NK.clamp_min(FLOOR).to(self._kept(logits_NV)),
        }
        if self.k < vocabulary:
            tails = [tail_of(logits_NV, ids_NK, temperature) for temperature in self.temperatures]
            payload["tails"] = torch.stack(tails, dim=1).clamp_min(FLOOR).to(wide(logits_NV))
        return payload

    def signal(self, payload: Payload, head: Head | None) -> signal.Signal:
        tails = {}
        if "tails" in payload:
            tails = dict(zip(self.temperatures, payload["tails"].unbind(1), strict=True))
        return signal.TopK(payload["ids"].long(), payload["logits"], tails)

    def refusal(self, term: Any) -> str | None:
        if getattr(term, "any_vocabulary", False):
            return f"{term.name} needs whole distributions; record with encoding=hidden_states"
        if isinstance(term, top_k.TopK):
            return (
                "divergence=top_k would take its k of those that are recorded; name the divergence it wraps, which is "
                "over the recorded k and the rest, or record with encoding=hidden_states"
            )
        if not hasattr(term, "temperature"):
            return f"{term.name} has no temperature, and the rest is summed for one; record with encoding=hidden_states"
        if term.temperature not in self.temperatures:
            return (
                f"temperature={term.temperature:g}, and the signal is recorded for "
                f"{', '.join(f'{t:g}' for t in self.temperatures)}; add it to encoding.temperatures"
            )
        return None

    def _kept(self, tensor: Tensor) -> torch.dtype:
        return torch.float64 if tensor.dtype == torch.float64 and self.dtype == "float32" else DTYPES[self.dtype]


def ids_dtype(vocabulary: int) -> torch.dtype:
    return torch.uint16 if vocabulary <= 2**16 else torch.int32
