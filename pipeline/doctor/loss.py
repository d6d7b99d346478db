"""Whether the loss of a step is its definition, however the step is cut up; before the first step of this training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from models.targets import IGNORED
from pipeline.data.loader import PackedSequences, accumulation
from pipeline.data.rows import Rows
from pipeline.data.sequences import Sequences
from pipeline.doctor import truth
from pipeline.doctor.findings import Finding, finding
from pipeline.doctor.probed import Probed

_DIVISION = (
    "the loss depends on how a step is cut into micro-batches: it must be one sum over the step, divided once by its "
    "targets (models/training/language_model.py); look at what was changed in objectives, data and training step"
)


def uneven(rows: Sequences | Rows, numbers: Sequence[int]) -> Rows:
    """Those rows, of which every second one learns from a quarter of its targets: a mean of means is another number."""
    found = []
    for place, number in enumerate(numbers):
        row = dict(rows[int(number)])
        if place % 2:
            learnt = [at for at, target in enumerate(row["targets"]) if target >= 0]
            left_out = set(learnt[max(1, len(learnt) // 4) :])
            row["targets"] = [IGNORED if at in left_out else target for at, target in enumerate(row["targets"])]
            row["supervised"] = len(learnt) - len(left_out)
            if "weights" in row:
                row["weights"] = [0.0 if at in left_out else weight for at, weight in enumerate(row["weights"])]
                row["weight"] = sum(row["weights"])
        found.append(row)
    return Rows(found)


def trained_loss(probed: Probed, rows: Sequences | Rows, micro_batch: int) -> tuple[dict[str, float], float]:
    """What a step over `rows` reports, by name, and the loss that its gradient is of, cut into such micro-batches."""
    trainer, module, world = probed.trainer, probed.module, probed.trainer.world_size
    data = PackedSequences(
        rows,
        None,
        seed=probed.data.seed,
        global_batch=len(rows),
        micro_batch=micro_batch,
        pad_token=probed.data.pad_token,
        length=probed.data.length,
        side=probed.data.side,
    )
    count = accumulation(len(rows), micro_batch, world)
    kept = trainer.accumulate_grad_batches, module.tokens_seen, module._operations
    trainer.accumulate_grad_batches, module._sums, returned = count, {}, 0.0
    batches = itertools.islice(data._loader(rows, data.order(trainer.global_rank, world)), count)
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        for number, batch in enumerate(batches):
            on_device = {n: b.to(module.device) if isinstance(b, Tensor) else b for n, b in batch.items()}
            returned += float(module.training_step(on_device, number)) / count
    sums, module._sums = module._sums, {}
    trainer.accumulate_grad_batches, module.tokens_seen, module._operations = kept
    module.step_metrics = None
    *reported, gradients = probed.summed([*(float(value) for value in sums.values()), returned / world])
    return dict(zip(sums, reported, strict=True)), gradients


def divided_once(probed: Probed) -> Finding:
    """Of a whole step the loss by its definition, that which is reported, and that which the gradient is of."""
    module, world, rank = probed.module, probed.trainer.world_size, probed.trainer.global_rank
    numbers = probed.data.order().step_sequences(0).tolist()
    rows = uneven(probed.data.train, numbers)
    mine = [rows[at] for at in range(rank, len(rows), world)]
    terms = [term for _, term in module.objective.terms]
    forwards = probed.most(sum(1 for row in mine for _ in truth.documents(row)))
    with probed.trainer.precision_plugin.forward_context():
        of_rank = truth.sums(terms, module.student, probed.teacher, mine, probed.vocabulary, forwards)
    names = sorted({term.name for term in terms} - of_rank.unknown)
    *parts, tokens = probed.summed([*(of_rank.terms.get(name, 0.0) for name in names), of_rank.tokens])
    true = {name: part / max(tokens, 1.0) for name, part in zip(names, parts, strict=True)}
    whole = not of_rank.unknown and not module.objective.representations
    if whole:
        true["loss"] = sum(factor * true[term.name] for factor, term in module.objective.terms)
    share = len(rows) // world
    sizes = [probed.data.micro_batch, *[m for m in (1, share) if m != probed.data.micro_batch][:1]]
    wrong, told = [], []
    first: dict[str, float] = {}
    for size in sizes:
        reported, gradients = trained_loss(probed, rows, size)
        found = {**{name: reported[name] for name in reported}, "gradient's loss": gradients}
        wanted = {**first, **true, **({"gradient's loss": true["loss"]} if whole else {})}
        wanted.setdefault("gradient's loss", reported["loss"])
        wrong += [
            f"{name} {found[name]:.6g} at micro_batch={size}, {wanted[name]:.6g} is right"
            for name in wanted
            if name in found and not _near(found[name], wanted[name], probed.low)
        ]
        first = first or reported
        told.append(f"{reported['loss']:.6g} at micro_batch={size}")
    by_definition = (
        f"{true['loss']:.6g} by definition" if whole else f"without {', '.join(sorted(of_rank.unknown)) or 'layers'}"
    )
    measured = "; ".join(wrong) or f"{', '.join(told)}; {by_definition} ({tokens:,.0f} targets)"
    return finding("loss division", not wrong, measured, _DIVISION)


def _near(one: float, other: float, low: bool) -> bool:
    relative, absolute = (2e-2, 2e-3) if low else (1e-4, 1e-6)
    return math.isfinite(one) and abs(one - other) <= relative * abs(other) + absolute
