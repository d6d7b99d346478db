"""One training step as it would run, traced without weights: what it holds at once, and what it computes."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from models.heads import head_of, hidden_states, through_head
from models.load import attention_of
from models.objectives import chunked
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal, TopK
from models.objectives.term import Objective
from models.teachers.teacher import Looked, look_through
from models.tracing.live import Live
from models.training.language_model import LanguageModel

WEIGHTS, TEACHER_WEIGHTS, GRADIENTS, BATCH = "weights", "teacher weights", "gradients", "batch"
ACTIVATIONS, TEACHER, ENGINE, BACKWARD, OPTIMIZER = "activations", "teacher", "engine", "backward", "optimizer"
_STANDING = (WEIGHTS, TEACHER_WEIGHTS, GRADIENTS)  # what every strategy holds in its own way
COMPUTES = ("float32", "autocast", "bfloat16")  # float32; bf16 over fp32 weights; weights in bf16, as DeepSpeed has it


@dataclass(frozen=True)
class Work:
    """What is traced. `student` makes the model that is trained, `teacher` the one beside it (None: none runs here)."""

    student: Callable[[], Any]
    objective: Objective
    optimizer: Callable[[Any], torch.optim.Optimizer]
    rows: int  # sequences of a micro-batch
    length: int  # tokens of each
    vocabulary: int
    teacher: Callable[[], Any] | None = None
    teacher_rows: int | None = None  # where the teacher reads other sequences
    teacher_length: int | None = None
    kept: int | None = None  # of a recorded signal: tokens that are kept at each position
    configs: tuple[Any, Any] | None = None  # student's and teacher's, where layers are compared
    activation_checkpointing: bool = False
    memory_bytes: int | None = None  # of the loss engine, as trainer.objective_memory_mb


@dataclass(frozen=True)
class Step:
    """Bytes are of one rank that holds everything; `forward` and `backward` are what is held at the fullest moment
    beyond weights and gradients, by what holds it."""

    trained: int  # parameters
    trained_sizes: list[int]  # of each of them
    frozen: int  # the student's other parameters
    weight_bytes: int  # all of the student's, with buffers
    trained_bytes: int
    teacher: int  # parameters
    teacher_bytes: int
    forward: Counter[str]
    backward: Counter[str]  # with the gradients that come to be, where it does not add to some that are there
    accumulates: bool
    optimizer_bytes: int  # its state
    optimizer_extra: int  # what a step holds beside it
    largest_module: int  # parameters of the student's largest one that has some of its own: what ZeRO-3 gathers at once
    flops: Counter[str] = field(default_factory=Counter)  # of one micro-batch, by what computes


@contextmanager
def pretended() -> Iterator[None]:
    """In it tensors have no values, and models no weights."""
    with (
        warnings.catch_warnings(),
        torch.random.fork_rng(devices=[]),
        mock.patch.object(nn.Module, "_apply", _applied),
        FakeTensorMode(),
    ):
        warnings.simplefilter("ignore")
        yield


def _applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """As nn.Module.to has it, by new parameters: tensors without values cannot be swapped in place."""
    for child in module.children() if recurse else ():
        child._apply(function)
    for name, old in module._parameters.items():
        if old is not None and (new := function(old.detach())).dtype != old.dtype:
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else function(buffer)
    return module


def made(config: Any, dtype: torch.dtype, attention: str | None = None) -> Any:
    """A model of this config, to be called inside `pretended`."""
    return AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=attention_of(config, None if attention == "auto" else attention)
    )


def trace(work: Work, compute: str, kind: str, accumulates: bool = True) -> Step:
    """`compute`: of COMPUTES. `kind`: cpu or cuda, whose buffers the loss engine takes. `accumulates`: the backward
    adds to gradients that are there; without, they come to be in it."""
    low = torch.bfloat16
    with pretended(), chunked.as_on(kind), Live() as live:
        student = work.student()
        beside = None if work.teacher is None else work.teacher()
        if compute == "bfloat16":
            _cast(student, low)
            _cast(beside, low)
        module = _module(work, student, beside, live)
        autocast = partial(torch.autocast, "cpu", dtype=low) if compute == "autocast" else nullcontext
        return _traced(module, beside, work, live, kind, autocast, accumulates)


def _cast(model: Any, dtype: torch.dtype) -> None:
    """In place; a tied tensor stays one."""
    made: dict[int, nn.Parameter] = {}
    for module in () if model is None else model.modules():
        for name, old in module._parameters.items():
            if old is not None and old.is_floating_point() and old.dtype != dtype:
                module._parameters[name] = made.setdefault(
                    id(old), nn.Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)
                )
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)


def _module(work: Work, student: Any, beside: Any, live: Live) -> LanguageModel:
    teacher: Any = None
    if beside is not None:
        teacher = _Beside(beside.eval().requires_grad_(False), work, live)
    elif work.kept is not None:
        teacher = _Recorded(work)
    module = LanguageModel(
        load_student=lambda: student,
        load_teacher=None if teacher is None else lambda: teacher,
        objective=work.objective,
        optimizer=work.optimizer,
        schedule=lambda *_: None,
        weight_decay=0.0,
        max_steps=1,
        vocabulary=work.vocabulary,
        packed=True,
        seed=0,
        log_every_steps=1,
        activation_checkpointing=work.activation_checkpointing,
        configs=work.configs,
        memory_bytes=work.memory_bytes,
    )
    module.configure_model()
    module.student.train()
    trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0, world_size=1)
    module._trainer = trainer  # type: ignore[assignment]
    return module


def _traced(
    module: LanguageModel, beside: Any, work: Work, live: Live, kind: str, autocast: Any, accumulates: bool
) -> Step:
    student, trained = module.student, module.trained()
    own = [*student.parameters(), *student.buffers(), *module.comparisons.parameters()]
    live.hold([] if beside is None else [*beside.parameters(), *beside.buffers()], TEACHER_WEIGHTS)
    live.hold(own, WEIGHTS)
    weights, teacher_weights = live.now[WEIGHTS], live.now[TEACHER_WEIGHTS]
    head = student.get_output_embeddings()  # the loss engine runs as its forward
    head.register_forward_pre_hook(lambda *_: setattr(live, "label", ENGINE))
    head.register_forward_hook(lambda *_: setattr(live, "label", ACTIVATIONS))
    live.flops.clear()
    if accumulates:
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
            live.hold([parameter.grad], GRADIENTS)
    forward, backward = _pass(module, work, live, autocast)
    flops = Counter(live.flops)
    optimizer, extra = _optimizer(module, live, kind)
    return Step(
        trained=sum(p.numel() for p in trained),
        trained_sizes=[p.numel() for p in trained],
        frozen=sum(p.numel() for p in student.parameters() if not p.requires_grad),
        weight_bytes=weights,
        trained_bytes=sum(p.numel() * p.element_size() for p in trained),
        teacher=0 if beside is None else sum(p.numel() for p in beside.parameters()),
        teacher_bytes=teacher_weights,
        forward=_beyond(forward),
        backward=_beyond(backward),
        accumulates=accumulates,
        optimizer_bytes=optimizer,
        optimizer_extra=extra,
        largest_module=_largest(student),
        flops=flops,
    )


def _pass(module: LanguageModel, work: Work, live: Live, autocast: Any) -> tuple[Counter[str], Counter[str]]:
    """What forward and backward of a micro-batch hold at their fullest."""
    with live.labelled(BATCH):
        batch = _batch(work)
    live.begin()
    with live.labelled(ACTIVATIONS), autocast():
        loss = module.training_step(batch, 0)
    forward = live.peak
    live.begin()
    with live.labelled(BACKWARD):
        loss.backward()
    return forward, live.peak


def _batch(work: Work) -> dict[str, Any]:
    shape = (work.rows, work.length)
    names = ("input_ids", "position_ids", "targets")
    tokens = work.rows * work.length
    tensors = {name: torch.zeros(shape, dtype=torch.long) for name in names}
    return {**tensors, "sequences": [0] * work.rows, "step_tokens": tokens, "tokens_of_step": tokens}


def _beyond(held: Counter[str]) -> Counter[str]:
    return Counter({label: size for label, size in held.items() if label not in _STANDING and size})


def _optimizer(module: LanguageModel, live: Live, kind: str) -> tuple[int, int]:
    """Bytes of the optimizer's state, and of what a step holds beside it."""
    module.zero_grad(set_to_none=True)
    for parameter in module.trained():
        parameter.grad = torch.empty_like(parameter)
    optimizer = module.optimizer([{"params": module.trained(), "weight_decay": 0.1}])
    for group in optimizer.param_groups:
        if kind == "cuda" and group.get("foreach", "") is None and not group.get("fused"):
            group["foreach"] = True  # as it chooses by itself for tensors on a GPU
    before = sum(live.now.values())
    with live.labelled(OPTIMIZER):
        optimizer.step()
        state = sum(live.now.values()) - before
        live.begin()
        optimizer.step()
    return state, sum(live.peak.values()) - before - state


def _largest(student: Any) -> int:
    """Parameters of the largest module that has some of its own: what ZeRO-3 has to gather at once."""
    return max(sum(p.numel() for p in module.parameters(recurse=False)) for module in student.modules())


class _Beside(nn.Module):
    """A teacher in the student's process, as models.teachers.online has it."""

    def __init__(self, model: Any, work: Work, live: Live) -> None:
        super().__init__()
        self.model, self.work, self.live = model, work, live

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        with self.live.labelled(TEACHER):
            shape = batch["input_ids"].shape
            rows, length = self.work.teacher_rows or shape[0], self.work.teacher_length or shape[1]
            if (rows, length) != tuple(shape):
                ids, positions = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
                batch = {**batch, "teacher_input_ids": ids, "teacher_position_ids": positions}
            looked = look_through(self.model, self._run, batch, wanted)
            if (rows, length) != tuple(shape):  # of its own prompts, at the student's tokens
                assert looked.hidden is not None
                looked.hidden = looked.hidden.new_empty(*shape, looked.hidden.shape[-1])
            return looked

    def _run(self, ids: Tensor, positions: Tensor, past: Any) -> Tensor:
        return hidden_states(self.model, ids, positions, past)

    def give(self, looked: Looked, work: Callable[[Signal], Any]) -> Any:
        assert looked.hidden is not None
        results: list[Any] = []
        through_head(self.model, looked.hidden, lambda h: results.append(work(Dense(h, head_of(self.model)))))
        return results[0]

    def check(self) -> None: ...

    def close(self) -> None: ...


class _Recorded:
    """A teacher of which only what was recorded is there."""

    def __init__(self, work: Work) -> None:
        self.kept = work.kept or 1

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        return Looked(batch)

    def give(self, looked: Looked, work: Callable[[Signal], Any]) -> Any:
        tokens = looked.batch["input_ids"].numel()
        ids = torch.zeros(tokens, self.kept, dtype=torch.long)
        return work(TopK(ids, torch.zeros(tokens, self.kept), {}))

    def check(self) -> None: ...

    def close(self) -> None: ...
