"""The one training step, and the one division of the loss."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from models import seeds
from models.errors import NotFinite, Refusal
from models.heads import check_split, head_of, hidden_states, through_head
from models.objectives.chunked import objective_sum
from models.objectives.cross_entropy import CrossEntropy
from models.objectives.nearness import with_nearness
from models.objectives.representation import Wanted
from models.objectives.signal import Signal
from models.objectives.term import Objective, needs_teacher
from models.teachers.teacher import Teacher, capturing
from models.training.checkpoint import restore
from models.training.costs import Arithmetic, peak_memory_gb, peak_of

if TYPE_CHECKING:
    from models.quantization.aware import Rounding
    from models.training.rollouts import Rollouts


class LanguageModel(pl.LightningModule):
    """Trains `student` by an objective, with or without a teacher.

    An objective returns a sum over supervised tokens; `training_step` divides it once, by `step_tokens`: the number of
    supervised tokens of the whole optimizer step, over all ranks and accumulated micro-batches, which every rank knows
    from the data order without asking the others. So the loss and its gradient do not depend on micro-batch size,
    accumulation, padding, packing or the number of ranks. A step on text of the student's own (`on_policy`) has it
    written before its first micro-batch, and so knows its tokens too.

    Dropout draws from a generator seeded by (seed, step, micro-batch, rank), so a resumed run has no state to restore.
    """

    def __init__(
        self,
        *,
        load_student: Callable[[], nn.Module],
        load_teacher: Callable[[], Teacher] | None,
        objective: Objective,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        schedule: Callable[[torch.optim.Optimizer, int], Any],
        weight_decay: float,
        max_steps: int,
        vocabulary: int,
        packed: bool,
        seed: int,
        log_every_steps: int,
        activation_checkpointing: bool,
        configs: tuple[Any, Any] | None = None,
        memory_bytes: int | None = None,
        compiled: bool = False,
        on_policy: Rollouts | None = None,
        rounding: Rounding | None = None,
        checkpoint: Path | None = None,
        arithmetic: Arithmetic | None = None,
    ) -> None:
        """`configs`: student's and teacher's, where the objective compares layers. The two after it: of the engine.
        `checkpoint`: where training goes on from. `arithmetic`: None where it is not known."""
        super().__init__()
        self.load_student, self.load_teacher = load_student, load_teacher
        self.objective, self.optimizer, self.schedule = objective, optimizer, schedule
        self.weight_decay, self.max_steps, self.vocabulary = weight_decay, max_steps, vocabulary
        self.packed = packed
        self.seed, self.log_every_steps, self.activation_checkpointing = seed, log_every_steps, activation_checkpointing
        self.configs, self.memory_bytes, self.compiled = configs, memory_bytes, compiled
        self.on_policy, self.rounding, self.checkpoint = on_policy, rounding, checkpoint
        self.arithmetic = arithmetic
        self.student: Any = None
        self.teacher: Any = None
        self.comparisons = nn.ModuleDict()  # of layers, with what they learn: in checkpoints, and not in the result
        self.step_metrics: dict[str, float] | None = None
        self.validation_metrics: dict[str, float] = {}
        self.tokens_seen = 0
        self.seconds_spent = 0.0  # training time, over restarts
        self.gradient_norm: Tensor | float | None = None
        self._sums: dict[str, Tensor] = {}
        self._offloaded: list[str] = []  # trained parameters whose optimizer is; each must have a gradient every step
        self._unreached: set[str] = set()  # of them, in this step so far
        self._operations: Tensor | float = 0.0  # of this rank, since the last step that was logged
        self._sequences: list[int] = []  # of the step so far, on this rank
        self._validation_sums: Tensor | None = None

    def configure_model(self) -> None:
        if self.student is not None:  # Lightning calls this more than once
            return
        self.student = self.load_student()
        if self.load_teacher is not None:
            self.teacher = self.load_teacher()
        for term in self.objective.representations:
            assert self.configs is not None
            self.comparisons[term.name] = term.build(*self.configs, seed=self.seed)
        if self.activation_checkpointing:
            self.student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def on_fit_start(self) -> None:
        if self.checkpoint is not None:
            restore(self.trainer, self, self.checkpoint)
        # Lightning leaves modules in the mode they come in, and from_pretrained returns eval: no dropout, no
        # activation checkpointing.
        self.student.train()
        with self.trainer.precision_plugin.forward_context():
            check_split(self.student, self.vocabulary, self.packed)
            if self.teacher is not None:
                self.teacher.check()

    def on_fit_end(self) -> None:
        if self.teacher is not None:
            self.teacher.close()

    def on_train_start(self) -> None:
        if getattr(self.trainer.optimizers[0], "offload_optimizer", False):
            for name, parameter in self.trained_by_name().items():
                parameter.register_hook(partial(self._reach, name))
                self._offloaded.append(name)
        self._started = time.monotonic() - self.seconds_spent
        self._marked = (self.tokens_seen, self.seconds_spent)
        self._peak = peak_of(self.device, str(self.trainer.precision))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Not in the step itself: there ZeRO-3 may be gathering ahead for the forward.
        step = self.trainer.global_step
        if self.rounding is not None:
            self.rounding.rule.step = step
        if batch_idx % self.trainer.accumulate_grad_batches or self.on_policy is None or not self.on_policy.due(step):
            return
        with self.trainer.precision_plugin.forward_context():
            self.on_policy.begin(
                self.student, step, device=self.device, rank=self.global_rank, world=self.trainer.world_size
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        accumulation = self.trainer.accumulate_grad_batches
        step, micro = self.trainer.global_step, batch_idx % accumulation
        objective, summed = self.objective, objective_sum
        if self.on_policy is not None and self.on_policy.due(step):
            batch = self.on_policy.take(batch, micro, rank=self.global_rank, world=self.trainer.world_size)
            objective, summed = self.on_policy.objective(objective), self.on_policy.sum
        torch.manual_seed(seeds.mixed(self.seed, step, micro, self.global_rank))
        self.step_metrics = None
        self._unreached = {*self._offloaded} if micro == 0 else self._unreached
        self._sequences = [*([] if micro == 0 else self._sequences), *batch["sequences"]]
        total, parts = self._objective(objective, batch, summed, told=self._logs(step + 1))
        if not torch.isfinite(total):
            raise NotFinite(
                f"step {step}: the loss is {total.item()} on sequences {batch['sequences']} "
                f"(micro-batch {micro}, rank {self.global_rank}); lower the learning rate or look at "
                f"these sequences; a checkpoint, if there is one, is from before this step"
            )
        for name, part in {"loss": total.detach(), **parts}.items():
            self._sums[name] = self._sums.get(name, 0) + part / batch["step_tokens"]
        self.tokens_seen += batch["tokens_of_step"] if micro == accumulation - 1 else 0
        if self.arithmetic is not None:
            self._operations = self._operations + self.arithmetic.of(batch)
        # Lightning divides by the accumulation, and ranks are averaged: undo both, then divide once.
        return total * (accumulation * self.trainer.world_size / batch["step_tokens"])

    def _objective(
        self,
        objective: Objective,
        batch: dict[str, Any],
        summed: Callable[..., Any] = objective_sum,
        told: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`told`: with how near the student is to its teacher."""
        wanted = Wanted()
        for comparison in objective.representations:
            assert self.configs is not None
            wanted = wanted | comparison.wanted(*self.configs)
        looked = self.teacher.look(batch, wanted) if needs_teacher(objective) else None
        ids, positions, targets = batch["input_ids"], batch["position_ids"], batch["targets"]
        weights = batch.get("weights")
        with capturing(self.student, wanted.student_hidden, wanted.student_relations) as capture:
            hidden = hidden_states(self.student, ids, positions)

        def engine(hidden: Tensor, signal: Signal | None = None) -> tuple[Tensor, dict[str, Tensor]]:
            result: tuple[Tensor, dict[str, Tensor]] = summed(
                with_nearness(objective, signal) if told and summed is objective_sum else objective,
                hidden,
                head_of(self.student),
                targets,
                signal,
                weights=weights,
                vocabulary=self.vocabulary,
                memory_bytes=self.memory_bytes,
                compiled=self.compiled,
            )
            return result

        def with_teacher(hidden: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            result: tuple[Tensor, dict[str, Tensor]] = self.teacher.give(looked, lambda signal: engine(hidden, signal))
            return result

        total, parts = through_head(self.student, hidden, engine if looked is None else with_teacher)
        for comparison in objective.representations:
            assert looked is not None
            capture.reshape(*ids.shape)
            weights_BT = (targets >= 0).float() if weights is None else weights
            value = self.comparisons[comparison.name](capture, looked.capture, positions, weights_BT)
            total, parts = total + comparison.weight * value, {**parts, comparison.name: value.detach()}
        return total, parts

    def trained(self) -> list[nn.Parameter]:
        return list(self.trained_by_name().values())

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        if self._engine is not None:
            return  # it clips whole steps; here, after every micro-batch, ZeRO-1 has the sum so far of this rank alone
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(
            self.trained(),
            gradient_clip_val or float("inf"),
        )
        self._check_gradient(self.gradient_norm, self.trainer.global_step)

    @property
    def _engine(self) -> Any:
        """DeepSpeed's, where it trains."""
        return getattr(self.trainer.strategy, "deepspeed_engine", None)

    def _check_gradient(self, norm: Any, step: int) -> None:
        if norm is not None and not math.isfinite(float(norm)):
            raise NotFinite(
                f"step {step}: the gradient's norm is {float(norm)} on sequences {self._of_all_ranks()} (all of the "
                f"step); lower the learning rate; a checkpoint, if there is one, is from before this step"
            )

    def _reach(self, name: str, _: Tensor) -> None:
        self._unreached.discard(name)

    def _check_reached(self, step: int) -> None:
        """DeepSpeed steps what it has offloaded with whatever its buffers hold, where there was no gradient: that of
        an earlier step, or another parameter's."""
        if unreached := sorted(self._unreached):
            more = f" and of {len(unreached) - 1} more" if len(unreached) > 1 else ""
            raise Refusal(
                f"step {step}: there was no gradient of {unreached[0]}{more}, and an offloaded optimizer would step it "
                f"with another one; use strategy=zero3 or ddp, or freeze it"
            )

    def _of_all_ranks(self) -> list[int]:
        """The sequences of the step; every rank asks, since the norm is the same on all of them. A rank that has met a
        loss that is no number is not among them: it has ended before the gradients were summed, and nobody is here."""
        found = [self._sequences]
        if self.trainer.world_size > 1:
            found = [[] for _ in range(self.trainer.world_size)]
            torch.distributed.all_gather_object(found, self._sequences)
        return [number for mine in found for number in mine if number >= 0]  # those left out have none

    def optimizer_step(self, epoch: int, batch_idx: int, *arguments: Any, **words: Any) -> None:
        super().optimizer_step(epoch, batch_idx, *arguments, **words)
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:  # DeepSpeed is stepped at every micro-batch
            self._close_step(self.trainer.global_step + 1)

    def _close_step(self, step: int) -> None:
        """Leave the step's numbers, summed over ranks, in `step_metrics` for whoever watches."""
        norm = self._engine.get_global_grad_norm() if self._engine is not None else self.gradient_norm
        self._check_gradient(norm, step - 1)
        self._check_reached(step - 1)
        sums, self._sums = self._sums, {}
        self.seconds_spent = time.monotonic() - self._started
        if not self._logs(step):
            return
        world, rank = self.trainer.world_size, self.trainer.global_rank
        memory = [peak_memory_gb(self.device) if other == rank else 0.0 for other in range(world)]
        costs = torch.tensor(memory, device=self.device), torch.as_tensor(self._operations, device=self.device).view(1)
        parts = torch.stack(list(sums.values())).detach()
        values = self.trainer.strategy.reduce(torch.cat([parts.float(), *(c.float() for c in costs)]), reduce_op="sum")
        (*of_parts, operations), self._operations = values.tolist(), 0.0
        (tokens_before, seconds_before), self._marked = self._marked, (self.tokens_seen, self.seconds_spent)
        seconds = self.seconds_spent - seconds_before
        self.step_metrics = {
            "step": step,
            **dict(zip([*sums, *(f"memory_gb/rank_{other}" for other in range(world))], of_parts, strict=True)),
            "learning_rate": self.trainer.optimizers[0].param_groups[0]["lr"],
            **({} if norm is None else {"grad_norm": float(norm)}),
            "tokens": self.tokens_seen,
            "tokens_per_second": (self.tokens_seen - tokens_before) / seconds,
            **({"tflops_per_rank": operations / seconds / world / 1e12} if self.arithmetic is not None else {}),
            **(
                {"mfu": operations / seconds / world / self._peak} if self.arithmetic is not None and self._peak else {}
            ),
            "seconds": self.seconds_spent,
            **({} if self.on_policy is None else self.on_policy.metrics(step)),
        }

    def _logs(self, step: int) -> bool:
        """Whether the step of this number, from 1 on, leaves its metrics."""
        return step % self.log_every_steps == 0 or step in (1, self.max_steps)

    def on_validation_epoch_start(self) -> None:
        self._validation_sums = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert self._validation_sums is not None
        total, _ = self._objective(CrossEntropy(), {k: v for k, v in batch.items() if k != "weights"})
        self._validation_sums += torch.tensor([float(total), float((batch["targets"] >= 0).sum())], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        assert self._validation_sums is not None
        total, tokens = self.trainer.strategy.reduce(
            self._validation_sums.float().to(self.device), reduce_op="sum"
        ).tolist()
        self.validation_metrics = {
            "step": self.trainer.global_step,
            "validation_loss": total / tokens,
            "tokens": self.tokens_seen,
            "seconds": self.seconds_spent,
        }

    def configure_optimizers(self) -> Any:
        decayed = [p for p in self.trained() if _dimensions(p) >= 2]
        others = [p for p in self.trained() if _dimensions(p) < 2]
        groups = [{"params": decayed, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = self.optimizer([g for g in groups if g["params"]])
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.schedule(optimizer, self.max_steps), "interval": "step"},
        }

    def trained_by_name(self) -> dict[str, nn.Parameter]:
        """What a checkpoint holds: what stands still is where training started, and the teacher belongs to none."""
        return {
            f"{part}.{name}": parameter
            for part, module in (("student", self.student), ("comparisons", self.comparisons))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def so_far(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What was counted, and tensors beside the parameters, for a checkpoint (models/training/checkpoint.py)."""
        kept = {name for name in self.student.state_dict() if name in dict(self.student.named_buffers())}
        tensors = {f"buffer.{name}": each for name, each in self.student.named_buffers() if name in kept}
        numbers: dict[str, Any] = {
            "tokens_seen": self.tokens_seen,
            "seconds_spent": self.seconds_spent,
            "validation_metrics": self.validation_metrics,
        }
        if self.on_policy is not None:
            numbers["on_policy"], buffered = self.on_policy.state()
            tensors |= {f"on_policy.{name}": each for name, each in buffered.items()}
        return numbers, tensors

    def go_on(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.tokens_seen, self.seconds_spent = numbers["tokens_seen"], numbers["seconds_spent"]
        self.validation_metrics = numbers["validation_metrics"]
        for name, buffer in self.student.named_buffers():
            if (saved := tensors.get(f"buffer.{name}")) is not None:
                buffer.copy_(saved)
        if self.on_policy is not None:
            buffered = {name.removeprefix("on_policy."): each for name, each in tensors.items()}
            self.on_policy.load(numbers["on_policy"], buffered)


def _dimensions(parameter: Any) -> int:
    """ZeRO-3 flattens what it shards; ds_shape remembers."""
    return len(getattr(parameter, "ds_shape", parameter.shape))
