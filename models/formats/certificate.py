"""What an export is worth against the model that it was made of: measured in fresh processes, on what was written.

`refer` runs the plain model, `certify` the export. Each is called in a process of its own, and only files pass between
them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import Refusal
from models.formats.format import Finished, Format, Runtime, Written
from models.formats.loaded import Loaded
from models.load import DTYPES, load_model
from models.matrices import matrices
from models.measure import Speed, served
from models.quantization.ggml import Blocks
from models.quantization.proof import round_as_quantized
from models.quantization.scheme import Activations, QuantizedMatrix
from models.quantization.stored import QuantizedWeights, open_quantized

# T tokens of a sample, V vocabulary, O outputs of a matrix, I its inputs

_AT_ONCE = 64  # tokens whose distributions are compared at once
_NOTHING = "nothing was written"


@dataclass(frozen=True)
class Tolerances:
    """How far an export may be from the model that it was made of."""

    logits: float  # as a share of the largest logit
    kl: float  # nats for each token
    rounded_kl: float  # likewise, where the format itself was asked to quantize

    def check(self, whose: str, name: str, figures: Mapping[str, Any], written: Written) -> None:
        """Judge the figures of `certify`. Raises Refusal with the figure that is too large and its setting; `whose`
        is for the message, who exports.

        A format that was asked to quantize plain weights may give another model, within `rounded_kl`; everything else
        has to be the same. Runtimes round activations by scales of their own, and a number that is rounded to the other
        side changes the logits: then the distributions alone are compared.
        """
        if not figures["weights_bit_equal"] and not written.rounded:
            raise Refusal(f"{whose}: {name}: {figures['first_odd_weight']} is another one once reloaded; {_NOTHING}")
        moved = written.rounded or written.activations is not None
        allowed = math.inf if moved else self.logits * max(figures["largest_logit"], 1e-9)
        most_kl = (self.rounded_kl, "rounded_kl_tolerance") if written.rounded else (self.kl, "kl_tolerance")
        for what, value, most, setting in (
            ("its logits differ by", figures["logits_max_difference"], allowed, "logits_tolerance"),
            ("its divergence is", figures["kl"], *most_kl),
        ):
            if not value <= most:
                raise Refusal(
                    f"{whose}: {name}: {what} {value:.1e} from the model's, and {most:.1e} is allowed "
                    f"(export.{setting}); {_NOTHING}"
                )


@torch.no_grad()
def refer(
    folder: str,
    quantized: Path | None,
    dtype: str,
    samples: Sequence[Tensor],
    out: Path,
    device: str,
    activations: Activations | None = None,
) -> None:
    """The plain model's logits of each sample (Int64[T]), a file each. `activations`: how inputs of quantized
    matrices are rounded. Raises Refusal where the weights are no longer made of the integers beside them."""
    model = load_model(folder, dtype=DTYPES[dtype]).to(device).eval()
    held = open_quantized(quantized) if quantized else None
    made = held.matrices if held else {}
    for matrix in matrices(model) if held else ():
        if str(matrix) not in made:
            continue
        weight_OI, dequantized_OI = matrix.of(model.get_parameter(matrix.parameter)), made[str(matrix)].dequantized()
        held_OI = weight_OI.cpu()  # the checkpoint may have rounded it to a dtype of its own
        if not any(torch.equal(held_OI, dequantized_OI.to(kind).to(held_OI.dtype)) for kind in DTYPES.values()):
            raise Refusal(
                f"{folder}: {matrix} is not what {quantized.name if quantized else ''} beside it stands for, having "
                f"been changed since; quantize the model again, or delete that file to export the weights as they are"
            )
        weight_OI.copy_(dequantized_OI)
    if held:
        if isinstance(held, QuantizedWeights):
            held = replace(held, scheme=replace(held.scheme, activations=activations))
        round_as_quantized(model, held)
    for number, ids_T in enumerate(samples):
        logits_TV = model(input_ids=ids_T[None].to(device), use_cache=False).logits[0]
        save_file({"logits": logits_TV.float().cpu().contiguous()}, reference(out, number))


def reference(folder: Path, number: int) -> Path:
    return folder / f"logits-{number:05d}.safetensors"


def certify(
    form: Format,
    folder: Path,
    finished: Finished,
    quantized: Path | None,
    samples: Sequence[Tensor],
    references: Path,
    device: str,
    settings: Speed,
    otherwise: Collection[str] = (),
    as_quantized: Path | None = None,
) -> dict[str, Any]:
    """The figures of an export's certificate, by what they were measured, and what serving one request takes.

    Weights are compared in the export's dtype: quantized ones with their dequantized values, all others with the plain
    checkpoint. `otherwise`: parameters that the container declares to hold in another way, which are not compared.
    `references`: of a model that rounds activations as the runtime does; `as_quantized`: as the scheme
    does, where that is another way.
    """
    runtime, quick = served(form, folder, samples[0][None, : settings.prompt_tokens], device, settings)
    odd = _odd(runtime, finished, quantized, set(otherwise))
    measured, other = _Compared(), _Compared()
    for number, ids_T in enumerate(samples):
        logits_TV = runtime.logits(ids_T[None])[0]
        measured.add(load_file(reference(references, number))["logits"], logits_TV, ids_T)
        if as_quantized is not None:
            other.add(load_file(reference(as_quantized, number))["logits"], logits_TV, ids_T)
    return {
        "weights_bit_equal": odd is None,
        "first_odd_weight": odd,
        **measured.figures(),
        **({} if as_quantized is None else {"kl_as_quantized": other.figures()["kl"]}),
        "runtime": runtime.name,
        "serving": quick,
    }


def _odd(runtime: Runtime, finished: Finished, quantized: Path | None, otherwise: Collection[str]) -> str | None:
    """The first parameter that differs once it is reopened."""
    kind = DTYPES[finished.dtype]
    for name, want in _truth(finished, quantized, otherwise):
        if not torch.equal(runtime.weight(name).cpu().to(kind), want.to(kind)):
            return name
    return None


def _truth(finished: Finished, quantized: Path | None, otherwise: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    """(parameter, or slot of one; numbers): the quantized ones first, and of a model that has none the layers'
    matrices, which it is asked for in any case."""
    plain = Loaded(load_model(str(finished.folder), dtype=DTYPES[finished.dtype]))
    held: Mapping[str, QuantizedMatrix | Blocks] = open_quantized(quantized).matrices if quantized is not None else {}
    for name, matrix in held.items():
        yield name, matrix.dequantized()
    layers = {} if held else {str(matrix): matrix.parameter for matrix in matrices(plain.model)}
    for name in layers:
        yield name, plain.weight(name)
    known = {name.partition("[")[0] for name in held} | set(layers.values()) | set(otherwise)
    for name, _ in plain.model.named_parameters():
        if name not in known:
            yield name, plain.weight(name)


class _Compared:
    """Sums over samples."""

    def __init__(self) -> None:
        self.apart = self.largest = self.kl = 0.0
        self.nats = {"reference": 0.0, "reloaded": 0.0}
        self.tokens = self.targets = 0

    def add(self, want_TV: Tensor, got_TV: Tensor, ids_T: Tensor) -> None:
        got_TV = got_TV[:, : want_TV.shape[1]]  # some runtimes fill up the vocabulary
        self.apart = max(self.apart, float((want_TV - got_TV).abs().max()))
        if not math.isfinite(float(got_TV.sum())):
            self.apart = math.inf
        self.largest = max(self.largest, float(want_TV.abs().max()))
        for begin in range(0, len(ids_T), _AT_ONCE):
            logp, logq = (each[begin : begin + _AT_ONCE].double().log_softmax(-1) for each in (want_TV, got_TV))
            self.kl += float((logp.exp() * (logp - logq)).sum())
            after = ids_T[begin + 1 : begin + 1 + _AT_ONCE, None]
            for name, log in (("reference", logp), ("reloaded", logq)):
                self.nats[name] -= float(log[: len(after)].gather(1, after).sum())
            self.targets += len(after)
        self.tokens += len(ids_T)

    def figures(self) -> dict[str, Any]:
        return {
            "logits_max_difference": self.apart,
            "largest_logit": self.largest,
            "kl": max(self.kl / self.tokens, 0.0),  # rounding alone can bring it below
            "perplexity_reloaded": math.exp(self.nats["reloaded"] / self.targets),
            "perplexity_before": math.exp(self.nats["reference"] / self.targets),
            "tokens": self.tokens,
        }
