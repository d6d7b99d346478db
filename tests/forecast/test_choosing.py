"""Which micro-batch and strategy are told to fit, for steps whose sizes are made up."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from models.tracing.step import ACTIVATIONS, Step
from pipeline.forecast.gpus import GPU
from pipeline.forecast.memory import TeacherHeld, held
from pipeline.forecast.place import Place
from pipeline.forecast.traces import micro_batches
from pipeline.forecast.training import STRATEGIES, Training
from pipeline.training.strategy import ZeRO

BILLION, GB = 10**9, 10**9


def step(compute: str, rows: int, accumulates: bool = True) -> Step:
    """A billion parameters, and 2 GB of activations for every sequence."""
    width = 2 if compute == "bfloat16" else 4
    work = Counter({ACTIVATIONS: 2 * GB * rows})
    return Step(
        trained=BILLION,
        trained_sizes=[BILLION],
        frozen=0,
        weight_bytes=width * BILLION,
        trained_bytes=width * BILLION,
        teacher=0,
        teacher_bytes=0,
        forward=work,
        backward=work,
        accumulates=accumulates,
        optimizer_bytes=2 * width * BILLION,
        optimizer_extra=0,
        largest_module=0,
    )


def stage(gpus: int, gigabytes: float, strategy: str, micro_batch: int = 4) -> Training:
    training = SimpleNamespace(global_batch=64, micro_batch=micro_batch)
    recipe = SimpleNamespace(training=training, precision="bf16-mixed", teacher=None, lora=None)
    none, packed = TeacherHeld(), 0
    traces: Any = SimpleNamespace(
        step=step, teacher=lambda _: none, saved_by_packing=lambda: packed, beside=False, read=4 * BILLION
    )
    trains: Any = SimpleNamespace(recipe=recipe)
    place = Place(GPU("made up", int(gigabytes * GB), 1e15, 1e14, 1e12), gpus, 8, 0.4, 1.0)
    return Training(trains, traces, place, STRATEGIES[strategy], strategy)


@pytest.mark.parametrize(
    ("strategy", "gigabytes"),
    [
        ("ddp", 4 + 4 + 4 + 8),  # weights, gradients, DDP's buckets, two moments
        ("zero1", 2 + 12 / 4 + 4 + 2 * 0.5 * 4),  # bf16 weights; shares; fp32 sums; two buckets of 500 M in fp32
        ("zero2", 2 + 12 / 4 + 4 / 4 + 2 * 0.5 * 2),  # the same, sums shared, buckets in bf16
        ("zero3", 2 / 4 + 2 * 0.55 + 12 / 4 + 4 / 4 + 0.5 * 2),  # gathered: 550 M parameters at once
    ],
)
def test_states_of_a_billion_parameters_on_four_gpus(strategy: str, gigabytes: float) -> None:
    compute = "autocast" if strategy == "ddp" else "bfloat16"
    made = held(STRATEGIES[strategy], step(compute, 1), TeacherHeld(), ranks=4, accumulates=True, cuda=True)
    assert made.total == pytest.approx((gigabytes + 2) * GB, rel=1e-6)


def test_offloaded_states_are_in_host_memory() -> None:
    offload = ZeRO(stage=3, offload_optimizer=True, offload_parameters=True)
    made = held(offload, step("bfloat16", 1), TeacherHeld(), ranks=4, accumulates=True, cuda=True)
    assert made.host == pytest.approx((12 + 4 + 2) * GB / 4)
    assert made.device["optimizer"] == made.device["gradients"] == 0


def test_states_on_a_disk_take_four_buffers_of_what_is_stepped_at_a_time() -> None:
    offload = ZeRO(3, True, True, nvme_path="/disk", config={"sub_group_size": BILLION // 10})
    made = held(offload, step("bfloat16", 1), TeacherHeld(), ranks=4, accumulates=True, cuda=True)
    assert made.host == pytest.approx(4 * 4 * 0.1 * GB + (4 + 2) * GB / 4)  # gradients are in memory, too
    teacher = TeacherHeld(bytes=14 * GB, largest=GB, sharded=True, offloaded=True)
    in_memory, on_disk = (
        held(STRATEGIES["ddp"], step("autocast", 1), each, ranks=4, accumulates=True, cuda=True).host
        for each in (teacher, replace(teacher, on_disk=True))
    )
    assert in_memory == 14 * GB / 4
    assert on_disk == 5 * GB / 4
    assert made.device["optimizer"] == made.device["gradients"] == 0


def test_the_largest_micro_batch_is_the_last_divisor_that_fits() -> None:
    made = stage(gpus=4, gigabytes=20 + 2 * 8 + 0.1, strategy="ddp")  # room for 8 sequences beside the states
    assert made.largest(made.strategy) == 8
    assert made.held(made.strategy, 8).total <= made.place.usable_bytes < made.held(made.strategy, 16).total


def test_the_fastest_strategy_that_fits_is_chosen() -> None:
    assert stage(4, 20 + 8.1, "zero3").best().strategy == "ddp"  # type: ignore[union-attr]
    assert stage(4, 8 + 8.1, "ddp").best().strategy == "zero2"  # type: ignore[union-attr]


def test_where_the_micro_batch_does_not_fit_a_smaller_one_is_told() -> None:
    best = stage(4, 8 + 2.1, "ddp").best()
    assert best is not None
    assert (best.strategy, best.micro_batch) == ("zero2", 1)


def test_where_nothing_fits_more_gpus_are_told() -> None:
    made = stage(2, 2 + 1.1 + 1 + 16 / 32 + 2 / 32 + 0.1, "zero3")  # a share of 32 ranks beside what all hold
    assert made.largest(STRATEGIES["zero3"]) is None
    more = made.more_gpus()
    assert more is not None
    assert more.gpus == 32


def test_micro_batches_divide_a_step() -> None:
    assert micro_batches(48, 4) == [1, 2, 3, 4, 6, 12]
    assert micro_batches(10, 4) == []


def test_a_teacher_beside_is_whole_but_under_zero3() -> None:
    teacher = TeacherHeld(bytes=14 * GB, largest=GB)

    def of(strategy: str) -> int:
        made = held(STRATEGIES[strategy], step("bfloat16", 1), teacher, ranks=7, accumulates=True, cuda=True)
        return made.device["teacher"]

    assert of("zero2") == 14 * GB
    assert of("zero3") == 2 * GB + GB
    packed = TeacherHeld(bytes=4 * GB, largest=GB, packed=True)
    made = held(STRATEGIES["zero3"], step("bfloat16", 1), packed, ranks=7, accumulates=True, cuda=True)
    assert made.device["teacher"] == 4 * GB


def test_packed_weights_are_not_told_to_be_sharded() -> None:
    made = stage(4, 80, "zero2")
    assert "zero3" in dict(made.choices())
    made.trains.recipe.lora = SimpleNamespace(base="nf4")  # type: ignore[assignment]
    assert made.packed == "lora.base=nf4"
    assert {"ddp", "zero2"} <= dict(made.choices()).keys()
    assert not {name for name in dict(made.choices()) if name.startswith("zero3")}
