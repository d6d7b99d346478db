"""What one rank holds at its fullest moment, by strategy: weights, gradients and optimizer as PyTorch and DeepSpeed lay
them out, around a training step that was traced (models/tracing/step.py).

The rules are read from DeepSpeed's zero/stage_1_and_2.py, zero/stage3.py and zero/partitioned_param_coordinator.py, and
held against runs on two ranks (tests/forecast/test_measured.py).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import Refusal
from models.nvme import BUFFERS
from models.tracing.step import ENGINE, OPTIMIZER, Step
from pipeline.training.strategy import DDP, Single, Strategy, ZeRO

# DeepSpeed's own numbers of the section zero_optimization, in elements.
_DEFAULTS = {
    "reduce_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "overlap_comm": None,
}
_FP32 = 4  # bytes
PARTS = ("parameters", "gradients", "optimizer", "teacher", "activations", "engine", "buffers")


@dataclass(frozen=True)
class Held:
    """Bytes. `device` by the names of PARTS; `host`: of the same rank, in the memory of its machine; `reading`: on the
    device, while weights are read in fp32 that are then held in fewer bits."""

    device: dict[str, int]
    host: int = 0
    reading: int = 0

    @property
    def total(self) -> int:
        return sum(self.device.values())

    @property
    def peak(self) -> int:
        return max(self.total, self.reading)


@dataclass(frozen=True)
class TeacherHeld:
    """A teacher in the student's process: `bytes` whole, `largest` those of its largest matrix."""

    bytes: int = 0
    largest: int = 0
    sharded: bool = False  # by an engine of its own, whatever the student's
    offloaded: bool = False  # its shares wait in host memory
    packed: bool = False  # in bits, which no engine shards
    on_disk: bool = False  # where they are offloaded to


def compute_of(strategy: Strategy, precision: str) -> str:
    """Of models.tracing.step.COMPUTES."""
    if precision == "32-true":
        return "float32"
    return "bfloat16" if isinstance(strategy, ZeRO) else "autocast"


def held(strategy: Strategy, step: Step, teacher: TeacherHeld, *, ranks: int, accumulates: bool, cuda: bool) -> Held:
    """`step` is traced as `compute_of` says; `accumulates`: an optimizer step has several micro-batches."""
    if isinstance(strategy, ZeRO):
        sharding = _sharded if strategy.stage == 3 else _partitioned
        made = sharding(strategy, step, ranks, accumulates, cuda)
    elif isinstance(strategy, Single | DDP):
        made = _whole(step, reduces=isinstance(strategy, DDP))
    else:
        raise Refusal(f"strategy={type(strategy).__name__}: forecast=true knows single, ddp and zero1 to zero3")
    if isinstance(strategy, ZeRO) and strategy.stage == 3:
        return _with_teacher(made, teacher, ranks, sharded=True, copies=strategy.copies_within)
    return _with_teacher(made, teacher, ranks, sharded=False, copies=1)


def _with_teacher(made: Held, teacher: TeacherHeld, ranks: int, sharded: bool, copies: int) -> Held:
    whole, host = teacher.bytes, made.host
    copied = math.ceil(whole / copies) if copies > 1 and not teacher.sharded and not teacher.packed else 0
    if (sharded or teacher.sharded) and not teacher.packed:
        share = math.ceil(whole / ranks)
        whole = (0 if teacher.offloaded else share) + copied + teacher.largest
        waiting = min(share, BUFFERS * math.ceil(teacher.largest / ranks)) if teacher.on_disk else share
        host += waiting if teacher.offloaded else 0
    return Held({**made.device, "teacher": made.device.get("teacher", 0) + whole}, host)


def _whole(step: Step, reduces: bool) -> Held:
    """Every rank holds all of it. DDP keeps a second copy of the gradients, in the buckets that it sums over ranks."""
    gradients = step.trained_bytes
    moments = [(gradients, step.forward), (gradients, Counter({OPTIMIZER: step.optimizer_extra}))]
    moments.append((gradients if step.accumulates else 0, step.backward))
    return _fullest(
        {"parameters": step.weight_bytes, "optimizer": step.optimizer_bytes},
        [(of_gradients, gradients if reduces else 0, work) for of_gradients, work in moments],
    )


def _partitioned(strategy: ZeRO, step: Step, ranks: int, accumulates: bool, cuda: bool) -> Held:
    """ZeRO-1 and 2: flat weights on every rank; of masters, optimizer and summed gradients a share."""
    share = math.ceil(step.trained / ranks)
    of_share = _FP32 * share
    low = step.trained_bytes < _FP32 * step.trained
    states = of_share + _states(step, ranks)
    whole_sums = strategy.stage == 1
    sums = _FP32 * step.trained if whole_sums else of_share
    bucket = _number(strategy, "reduce_bucket_size") * (_FP32 if whole_sums or not low else 2)
    bucket *= 2 if _overlaps(strategy, cuda) else 1
    between = sums if accumulates else 0  # what waits from one micro-batch to the next
    if strategy.offload_optimizer:
        return _offloaded_optimizer(step, share, states, bucket, whole_sums and between)
    kept = sums if whole_sums or low else between  # while a backward goes on
    moments = [
        (between, bucket if whole_sums and accumulates else 0, step.forward),
        (kept, bucket, step.backward),
        (sums + of_share, bucket, Counter[str]()),  # all gradients are there, and the share is made of them
        (2 * of_share, 0, Counter({OPTIMIZER: step.optimizer_extra // ranks})),
    ]
    return _fullest({"parameters": step.weight_bytes, "optimizer": states}, moments)


def _offloaded_optimizer(step: Step, share: int, states: int, bucket: int, between: int) -> Held:
    moments = [(between, bucket, step.forward), (between, bucket, step.backward)]
    made = _fullest({"parameters": step.weight_bytes}, moments)
    return Held(made.device, host=states + _FP32 * share)


def _sharded(strategy: ZeRO, step: Step, ranks: int, accumulates: bool, cuda: bool) -> Held:
    """ZeRO-3: a share of everything, and whole weights of the layers that are at work or soon will be."""
    share = math.ceil(step.trained / ranks)
    width = step.trained_bytes // step.trained
    weights = width * (step.trained + step.frozen)
    buffers = step.weight_bytes - weights
    soon = _number(strategy, "stage3_max_reuse_distance") // 2 + _number(strategy, "stage3_prefetch_bucket_size")
    gathered = min(weights, width * (soon + step.largest_module))
    bucket = width * _number(strategy, "reduce_bucket_size")
    states, sums = _FP32 * share + _states(step, ranks), _FP32 * share
    parameters, host = math.ceil(weights / ranks), 0
    copies = math.ceil(weights / strategy.copies_within) if strategy.copies_within > 1 else 0
    if strategy.offload_parameters:
        parameters, host = 0, parameters
    if strategy.offload_optimizer:
        if strategy.nvme_path is not None:  # four buffers: master, both moments and gradient of what is stepped
            states = 4 * _FP32 * min(share, strategy.stepped_at_a_time)
        states, sums, host = 0, 0, host + states + sums
    reduced = min(bucket, width * step.trained)
    return Held(
        _fullest(
            {"parameters": parameters + copies + buffers + gathered, "optimizer": states},
            [
                (sums, bucket, step.forward),
                (sums, bucket, step.backward),
                (sums, bucket + reduced, Counter[str]()),
                (2 * sums, bucket, Counter({OPTIMIZER: step.optimizer_extra // ranks})),
            ],
        ).device,
        host,
    )


def _states(step: Step, ranks: int) -> int:
    """Of the optimizer, on fp32 masters."""
    width = _FP32 * step.trained / step.trained_bytes  # traced on bf16 weights, moments were in bf16
    return math.ceil(step.optimizer_bytes * width / ranks)


def _fullest(standing: dict[str, int], moments: Sequence[tuple[int, int, Counter[str]]]) -> Held:
    """`moments`: gradients, communication buffers and traced work of each phase of a step."""
    gradients, buffers, work = max(moments, key=lambda each: each[0] + each[1] + sum(each[2].values()))
    engine = work.get(ENGINE, 0)
    return Held(
        {
            **standing,
            "gradients": gradients,
            "activations": sum(work.values()) - engine,
            "engine": engine,
            "buffers": buffers,
        }
    )


def _number(strategy: ZeRO, name: str) -> int:
    value = (strategy.config or {}).get(name, _DEFAULTS[name])
    assert value is not None
    return int(value)


def _overlaps(strategy: ZeRO, cuda: bool) -> bool:
    return bool((strategy.config or {}).get("overlap_comm", cuda))
