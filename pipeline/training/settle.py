"""From a training run that is over to the published artifact: the weights are gathered, adapters merged, rounded
matrices made the quantized ones that they stood for, and what is saved is compared with what was trained."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import Refusal
from models.load import load_model, unsharded
from models.lora import merge, write_adapter
from models.quantization.aware import Rounding
from models.quantization.proof import bits_per_weight, check_held
from models.quantization.stored import BlockWeights, QuantizedWeights, open_quantized
from models.save import Weights, save_model
from models.sharding import gathered_weights
from models.sparsity import zeros
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.batch import collate
from pipeline.data.loader import PackedSequences
from pipeline.training.fit import Fitted
from pipeline.training.outcome import doubt
from pipeline.training.ranks import beat, unwatch, watch

_PROOF_SEQUENCES = 4
_TOLERANCE = 1e-4  # of the largest logit


@dataclass
class Settled:
    """The plain model that is saved, its weights (whole, or one after the other), and what is known of it."""

    model: Any
    weights: Weights
    certificates: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    also: list[Callable[[Path], None]] = field(default_factory=list)  # write more files beside the model


def settle(context: Context, fitted: Fitted) -> None:
    """Publish `<run_dir>/<stage>/`. Every rank calls it: rank 0 writes the weights as the ranks gather them."""
    recipe, trainer, student = fitted.student.recipe, fitted.trainer, fitted.student
    changed = recipe.lora is not None or recipe.qat is not None  # merged or quantized before they are saved, in fp32
    model = start = None
    if trainer.is_global_zero:
        model = student.load_to_merge() if changed else fitted.module.student
        start = student.load_start() if recipe.keep_zeros else None
    trainer.strategy.barrier()  # reading them may take long, and the others are watched from here on
    weights = _gathered(context, fitted, None if changed else recipe.saved)
    if trainer.is_global_zero:
        settled = _made_plain(context, fitted, model, weights) if changed else Settled(model, weights)
        _publish(context, fitted, settled, start)
    else:
        for _ in weights:
            pass
    trainer.strategy.barrier()


def _gathered(context: Context, fitted: Fitted, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    watch(context, unit="tensor")
    learnt = functools.partial(_is_learnt, fitted)
    yield from gathered_weights(fitted.module.student, fitted.trainer.is_global_zero, dtype, learnt, after=beat)
    unwatch()  # rank 0 takes its time, and the others wait for it


@torch.no_grad()
def _made_plain(context: Context, fitted: Fitted, model: Any, learnt: Iterator[tuple[str, Tensor]]) -> Settled:
    """`model` with what was learnt, its adapters merged and its matrices quantized, with the proof that this changed
    nothing. Raises Refusal where it did."""
    student, recipe = fitted.student, fitted.student.recipe
    rounding = student.rounding
    state, adapters = model.state_dict(), {}
    names = {name for name in state if _is_learnt(fitted, name)}
    for name, tensor in learnt:
        state[name].copy_(tensor)
        names.remove(name)
        if "lora_" in name:
            adapters[name] = tensor
    assert not names, f"not gathered: {', '.join(sorted(names))}"
    settled = Settled(model, {})
    if rounding is not None:
        _quantize(context, fitted, settled, rounding)
    else:
        if not recipe.keep_zeros:
            start = context.parents["student"]["path"] if "student" in context.parents else student.folder
            settled.also.append(lambda out: write_adapter(student.adapter, str(start), adapters, out / "adapter"))
        proof = _unchanged(context, model, fitted.sequences, merge, recipe.saved)
        settled.certificates["merged_equals_adapter"] = proof
    settled.weights = model.state_dict()
    return settled


def _is_learnt(fitted: Fitted, name: str) -> bool:
    """Whether a tensor of the trained model is taken over: without adapters all are; with adapters the others still
    are the start's, but for what rounding learns beside them."""
    rounding = fitted.student.rounding
    return (
        fitted.student.recipe.lora is None
        or "lora_" in name
        or (rounding is not None and name.rpartition(".")[2] in rounding.rule.own)
    )


def _quantize(context: Context, fitted: Fitted, settled: Settled, rounding: Rounding) -> None:
    saved = fitted.student.recipe.saved
    rounding.rule.step = fitted.steps  # also where a restart has found no step left
    made: list[QuantizedWeights | BlockWeights] = []

    def freeze(model: Any) -> None:
        made.append(rounding.settle(model))

    proof = _unchanged(context, settled.model, fitted.sequences, freeze, saved, rounding.served)
    settled.certificates["trained_equals_frozen"] = proof
    settled.also.append(functools.partial(_write_quantized, context, made[0], saved))
    settled.certificates["weights_bit_equal"] = True  # or `_write_quantized` raises
    settled.metrics["bits_per_weight"] = bits_per_weight(settled.model, made[0], saved)


def _write_quantized(
    context: Context, quantized: QuantizedWeights | BlockWeights, saved: torch.dtype, folder: Path
) -> None:
    """Beside a model that was written; its weights are read again, and compared with their dequantized values."""
    quantized.write(folder / artifact.QUANTIZED)
    with unsharded():
        again = load_model(str(folder), dtype=saved)
        check_held(again, open_quantized(folder / artifact.QUANTIZED), saved, context.stage)


@torch.no_grad()
def _unchanged(
    context: Context,
    model: Any,
    sequences: PackedSequences,
    change: Callable[[Any], object],
    saved: torch.dtype,
    served: Callable[[Any], AbstractContextManager[None]] = nullcontext,
) -> dict[str, float]:
    """`change` a trained model in place into the plain one that is saved, and measure on text what that changed, in
    float32 and in the dtype that is saved, the plain one as it is `served`. Raises Refusal where it is more than
    float32's rounding."""
    numbers = range(min(_PROOF_SEQUENCES, len(sequences.train)))
    batch = collate([sequences.train.arrays(number) for number in numbers], pad_token=sequences.pad_token)
    words = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    model.eval()
    before = model(**words).logits
    change(model)
    with served(model):
        after = model(**words).logits
    real = batch["targets"] >= 0
    apart, largest = float((after - before)[real].abs().max()), float(before[real].abs().max())
    if not apart <= _TOLERANCE * largest:
        raise Refusal(
            f"{context.stage}: what is saved gives logits that differ by {apart:.1e} from what was trained, of "
            f"{largest:.1e} at most; nothing was written"
        )
    proof = {"max_difference": apart, "largest_logit": largest, "tolerance": _TOLERANCE * largest}
    if saved != torch.float32:
        for parameter in model.parameters():
            parameter.copy_(parameter.to(saved))
        with served(model):
            proof["max_difference_saved"] = float((model(**words).logits - before)[real].abs().max())
    return proof


def _publish(context: Context, fitted: Fitted, settled: Settled, start: Any) -> None:
    """`start`: the model that training began with, where its zeros had to be kept."""
    saved, module, steps, rollouts = fitted.student.recipe.saved, fitted.module, fitted.steps, fitted.rollouts

    doubtful = doubt(context.work / artifact.METRICS, len(fitted.tokenizer))
    if doubtful:
        print(f"{context.stage}: warning: {doubtful}", flush=True)

    def build(folder: Path) -> None:
        weights = settled.weights
        if start is not None:
            counts = settled.certificates["zeros_kept"] = {}  # filled as the weights are written
            weights = zeros.watched(start, weights, counts)
        save_model(settled.model, fitted.tokenizer, folder, weights, saved)
        for write in settled.also:
            write(folder)
        recorded = context.work / artifact.METRICS
        if recorded.exists():
            shutil.copy(recorded, folder / artifact.METRICS)

    artifact.publish(
        context.out,
        build,
        {
            **context.manifest(context.makes(context.stage)),
            "tokens": module.tokens_seen,
            "steps": steps,
            "seconds": round(module.seconds_spent, 3),
            "metrics": {
                "parameters": fitted.student.parameters,
                **settled.metrics,
                "data": fitted.prepared.statistics,
                **({"on_policy": rollouts.metrics(steps)} if rollouts else {}),
                "validation": module.validation_metrics or None,
            },
            "certificates": settled.certificates,
            **({"doubt": doubtful} if doubtful else {}),
        },
    )
