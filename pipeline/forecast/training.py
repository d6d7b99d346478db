"""Memory, time and cost of a stage that trains, and which strategy and micro-batch to choose for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from models.errors import Refusal
from models.tracing.step import TEACHER, Step
from pipeline.forecast.memory import Held, compute_of, held
from pipeline.forecast.place import Place
from pipeline.forecast.traces import Traces, micro_batches
from pipeline.forecast.workload import BYTES_OF_TEXT_A_TOKEN, Trains
from pipeline.training.strategy import DDP, Single, Strategy, ZeRO

STRATEGIES: dict[str, Strategy] = {  # from the fastest on, as conf/strategy has them
    "single": Single(),
    "ddp": DDP(),
    "zero1": ZeRO(stage=1),
    "zero2": ZeRO(stage=2),
    "zero3": ZeRO(stage=3),
    "zero3_offload": ZeRO(stage=3, offload_optimizer=True, offload_parameters=True),
}
_MOST_GPUS = 65_536


@dataclass(frozen=True)
class Fit:
    """A way to run the stage, and what a rank then holds."""

    strategy: str
    micro_batch: int
    gpus: int
    held: Held


@dataclass
class Training:
    trains: Trains
    traces: Traces
    place: Place
    strategy: Strategy  # as it is configured
    name: str  # of that strategy

    def held(self, strategy: Strategy, micro_batch: int, gpus: int | None = None) -> Held:
        gpus = gpus or self.place.gpus
        recipe = self.trains.recipe
        compute = compute_of(strategy, recipe.precision)
        accumulates = recipe.training.global_batch > micro_batch * gpus
        # DeepSpeed takes every gradient away as it comes to be.
        step = self.traces.step(compute, micro_batch, accumulates or isinstance(strategy, ZeRO))
        made = held(
            strategy, step, self.traces.teacher(compute), ranks=gpus, accumulates=accumulates, cuda=self.place.cuda
        )
        packed = self.traces.saved_by_packing() // (2 if compute == "bfloat16" else 1)
        whole = self.place.cuda and not strategy.shards_parameters and not packed
        reading = made.device.get("teacher", 0) + self.traces.read if whole else 0
        return Held({**made.device, "parameters": made.device["parameters"] - packed}, made.host, reading)

    @property
    def configured(self) -> Held:
        return self.held(self.strategy, self.trains.recipe.training.micro_batch)

    def fits(self, made: Held) -> bool:
        return made.peak <= self.place.usable_bytes

    def largest(self, strategy: Strategy, gpus: int | None = None) -> int | None:
        """The largest micro-batch that fits and divides an optimizer step; None where not even one sequence does, or
        where no memory limits it."""
        if self.place.gpu is None:
            return None
        found = None
        for micro_batch in micro_batches(self.trains.recipe.training.global_batch, gpus or self.place.gpus):
            if not self.fits(self.held(strategy, micro_batch, gpus)):
                break
            found = micro_batch
        return found

    @property
    def packed(self) -> str | None:
        """The setting by which weights are packed in bits, which no engine shards; None where none are."""
        recipe = self.trains.recipe
        if self.traces.beside and (weights := recipe.teacher.packed_weights):  # type: ignore[union-attr]
            return f"teacher.weights={weights}"
        return None if recipe.lora is None or recipe.lora.base is None else f"lora.base={recipe.lora.base}"

    def choices(self) -> Iterator[tuple[str, Strategy]]:
        """What can run on so many GPUs, from the fastest on; the configured one with its own numbers."""
        packed = self.packed
        own = {} if self.name in STRATEGIES else {self.name: self.strategy}  # zero3_nvme, whose folder no other knows
        for name, strategy in {**STRATEGIES, **own}.items():
            if strategy.several_ranks != (self.place.gpus > 1) and not offloads(strategy):
                continue
            if packed and isinstance(strategy, ZeRO) and strategy.stage == 3:
                continue
            yield name, self.strategy if name == self.name else strategy

    def best(self) -> Fit | None:
        """The fastest strategy with which the configured micro-batch fits, else the fastest with a smaller one. What
        waits in host memory is taken where nothing else fits."""
        wanted, chosen = self.trains.recipe.training.micro_batch, list(self.choices())
        fast = [(name, strategy) for name, strategy in chosen if not offloads(strategy)]
        for some in (fast, chosen):
            for name, strategy in some:
                if self.fits(made := self.held(strategy, wanted)):
                    return Fit(name, wanted, self.place.gpus, made)
            for name, strategy in some:
                if (most := self.largest(strategy)) is not None:
                    return Fit(name, most, self.place.gpus, self.held(strategy, most))
        return None

    def more_gpus(self) -> Fit | None:
        """The least doubling of the GPUs on which one sequence at a time fits under ZeRO-3."""
        gpus, strategy = 2 * self.place.gpus, STRATEGIES["zero3"]
        while gpus <= _MOST_GPUS:
            if self.fits(made := self.held(strategy, 1, gpus)):
                return Fit("zero3", 1, gpus, made)
            gpus *= 2
        return None

    @property
    def step(self) -> Step:
        """As it is configured."""
        recipe = self.trains.recipe
        accumulates = recipe.training.global_batch > recipe.training.micro_batch * self.place.gpus
        compute = compute_of(self.strategy, recipe.precision)
        return self.traces.step(compute, recipe.training.micro_batch, accumulates or isinstance(self.strategy, ZeRO))

    @property
    def flops_per_token(self) -> float:
        """Of all that a micro-batch needs: both models and the loss, without what is computed again to save memory, as
        an efficiency (MFU) is told of, here and in models/training/costs.py."""
        return self._a_token(sum(self._flops.values()))

    @property
    def flops_without_teacher(self) -> float:
        """The same without the teacher's body: plain training takes as much, or a little less in the loss."""
        return self._a_token(sum(count for label, count in self._flops.items() if label != TEACHER))

    @cached_property
    def _flops(self) -> Counter[str]:
        if not self.trains.recipe.training.activation_checkpointing:
            return self.step.flops
        return replace(self, traces=replace(self.traces, again=False, _steps={})).step.flops

    def _a_token(self, flops: int) -> float:
        return flops / (self.trains.recipe.training.micro_batch * self.trains.recipe.data.max_length)

    @property
    def tokens(self) -> int | None:
        """That are trained on, at most."""
        training, length = self.trains.recipe.training, self.trains.recipe.data.max_length
        limits = [] if training.max_tokens is None else [training.max_tokens]
        if training.max_steps is not None:
            limits.append(training.max_steps * training.global_batch * length)
        if training.epochs is not None and self.trains.text_bytes is not None:
            limits.append(int(training.epochs * self.trains.text_bytes / BYTES_OF_TEXT_A_TOKEN))
        return min(limits, default=None)


def offloads(strategy: Strategy) -> bool:
    return isinstance(strategy, ZeRO) and strategy.offload_optimizer


def strategy_name(config: dict[str, Any], strategy: Strategy) -> str:
    """That of conf/strategy, as far as the configuration is one of them."""
    if isinstance(strategy, ZeRO):
        if strategy.nvme_path is not None:
            return f"zero{strategy.stage}_nvme"
        return f"zero{strategy.stage}" + ("_offload" if strategy.offload_optimizer else "")
    for name, known in STRATEGIES.items():
        if type(known) is type(strategy):
            return name
    raise Refusal(f"strategy={config['_target_']}: forecast=true knows {', '.join(STRATEGIES)}")
