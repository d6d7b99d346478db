"""What a served teacher computes in, proved on a sample and not taken from its own or anybody's word.

Where the teacher's weights are in a folder here, its log-probabilities are worked out from them, one layer at a time,
in float32 and in bfloat16, and the server's rounding shows beside these. Without weights its answers are looked at
alone: logits that were rounded to 16 bits are multiples of that dtype's spacing, and so are their differences, which
are those of the log-probabilities. That is never so by chance; where it is not so, nothing is proved.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import Refusal
from models.heads import head_of
from models.layerwise import Passage
from models.load import DTYPES
from models.offloaded import load_offloaded

log = logging.getLogger(__name__)

# T tokens of a piece, K tokens told of after each

# Root mean square error of log-probabilities from float32, as a share of bfloat16's: of float32 in another order about
# 1e-4, of float16 and TF32, with three more bits, about 1/8, of bfloat16 in another order about 1.
SHARES = {"float32": 1 / 64, "float16": 1 / 2, "bfloat16": 4.0}
# Beyond both it is another model: of the same weights in 4 bits the error was 20 to 40 times bfloat16's, 0.2 to 0.4
# nats; of other weights 130 times and more, 2 nats and more.
OTHER_SHARE, OTHER_NATS = 20.0, 1.0
SPACINGS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # between neighbours, of logits of 0.5 and more
Told = tuple[Tensor, Tensor]  # of a piece: ids Int64[T-1, K], log-probabilities Float32[T-1, K]; as Endpoint.score


@dataclass(frozen=True)
class Precision:
    dtype: str | None  # the widest of models.load.DTYPES that is proved; None: nothing is
    proof: str
    tokens: int  # of the sample
    error: float | None = None  # root mean square of log-probabilities from float32's, in nats
    error_of_bfloat16: float | None = None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, claimed: str, url: str) -> None:
        """Refuse a claim that the proof contradicts, and another model whatever is claimed. What is further off than
        bfloat16, but may have fewer bits, is recorded where no more than that is claimed."""
        if self._is_other:
            raise Refusal(
                f"teacher.endpoint.url={url}: it serves another model than that at teacher.path, further off than "
                f"any dtype{self._off}; serve what lies at teacher.path, or give the path of what is served"
            )
        if self.dtype is not None and SHARES[self.dtype] > SHARES[claimed]:
            raise Refusal(
                f"teacher.dtype={claimed}: the server at {url} computes in {self.dtype}{self._off}; start it with "
                f"`--dtype {claimed}` (vLLM), or set teacher.dtype={self.dtype}"
            )
        if self.error is None or self.dtype is not None:
            return
        told = f"teacher.dtype={claimed}: the server at {url} is further off than bfloat16{self._off}"
        if claimed != "bfloat16":
            raise Refusal(
                f"{told}, so it has fewer bits or another model; serve what lies at teacher.path, or set "
                f"teacher.dtype=bfloat16 to record it as it is"
            )
        log.warning("%s; is it the model at teacher.path? It is recorded as it is", told)

    @property
    def _is_other(self) -> bool:
        if self.error is None or self.error_of_bfloat16 is None:
            return False
        return self.error > max(OTHER_SHARE * self.error_of_bfloat16, OTHER_NATS)

    @property
    def _off(self) -> str:
        if self.error is None:
            return ""
        return f" (its log-probabilities by {self.error:.2g} nats; bfloat16's by {self.error_of_bfloat16:.2g})"


def has_weights(path: str) -> bool:
    """Whether `path` is a folder with weights that are no packed integers."""
    folder = Path(path)
    config = folder / "config.json"
    packed = config.is_file() and "quantization_config" in config.read_text()
    return bool(list(folder.glob("*.safetensors"))) and not packed and not (folder / "signal.json").exists()


def by_own_forward(
    pieces: Sequence[Sequence[int]], told: Sequence[Told], path: str, aside: Path, device: str, trust_remote_code: bool
) -> Precision:
    """`aside`: a folder for what is made of the weights on the way."""
    own = {
        name: _log_probabilities(pieces, told, path, aside, device, trust_remote_code, DTYPES[name])
        for name in ("float32", "bfloat16")
    }
    known = [values_TK > -np.inf for _, values_TK in told]
    theirs = torch.cat([values_TK[at] for (_, values_TK), at in zip(told, known, strict=True)]).double()
    exact, rounded = (
        torch.cat([values_TK[at] for values_TK, at in zip(each, known, strict=True)]) for each in own.values()
    )
    error, of_bfloat16 = (float((each - exact).square().mean().sqrt()) for each in (theirs, rounded))
    dtype = next((name for name, share in SHARES.items() if error <= share * of_bfloat16), None)
    tokens = sum(len(ids_TK) for ids_TK, _ in told)
    proof = "own forward" if dtype else "own forward: further off than bfloat16, so in fewer bits or another model"
    return Precision(dtype, proof, tokens, error, of_bfloat16)


def by_spacing(told: Sequence[Told]) -> Precision:
    tokens = sum(len(ids_TK) for ids_TK, _ in told)
    differences = [(values_TK[:, 1:] - values_TK[:, :1]).double() for _, values_TK in told]
    apart = torch.cat([each[each.isfinite() & (each < 0)] for each in differences])
    for name, step in SPACINGS.items():
        off = (apart / step - (apart / step).round()).abs() * step
        # Log-probabilities are float32 of up to 32 nats.
        if len(apart) >= 32 and float((off < 8e-6).double().mean()) > 0.95:
            return Precision(name, "spacing of its logits", tokens)
    return Precision(None, "none: no weights at teacher.path, and its logits show no spacing", tokens)


@torch.no_grad()
def _log_probabilities(
    pieces: Sequence[Sequence[int]],
    told: Sequence[Told],
    path: str,
    aside: Path,
    device: str,
    trust_remote_code: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Float64[T-1, K] of each piece, at the tokens that the server told of."""
    opened = load_offloaded(path, aside, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    batches = [torch.tensor([list(piece)], device=device) for piece in pieces]
    head, found = head_of(opened.model), []
    for hidden_1TH, (ids_TK, _) in zip(Passage(opened.model, batches, opened.weights).last(), told, strict=True):
        logits_TV = head.logits(hidden_1TH[0, :-1], dtype).float()
        at_TK = ids_TK.clamp(min=0).to(logits_TV.device)
        found.append(logits_TV.log_softmax(-1).gather(1, at_TK).double().cpu())
    return found
