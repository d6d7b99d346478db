"""A step traced on tensors without values holds and computes what a real one does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.objectives.cross_entropy import CrossEntropy
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.teachers.online import Resident
from models.teachers.teacher import Opening
from models.tracing.depth import deepened, depths, shallow
from models.tracing.reading import read, write
from models.tracing.step import ENGINE, TEACHER, Step, Work, made, trace
from models.training.language_model import LanguageModel

ROWS, LENGTH, VOCABULARY = 2, 64, 512


def llama(layers: int = 3, **more: Any) -> Any:
    widths = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoConfig.for_model("llama", num_hidden_layers=layers, **{**widths, "vocab_size": VOCABULARY, **more})


def work(student: Any, teacher: Any = None, **more: Any) -> Work:
    objective = CrossEntropy() if teacher is None else Distillation(alpha=0.5, divergence=ForwardKL())
    return Work(
        student=lambda: made(student, torch.float32),
        teacher=None if teacher is None else lambda: made(teacher, torch.float32),
        objective=objective,
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        rows=ROWS,
        length=LENGTH,
        vocabulary=VOCABULARY,
        **more,
    )


def allocated(step: Callable[[], Any]) -> int:
    """The most bytes that PyTorch's CPU allocator had given at once in `step`, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    counts: list[tuple[int, int, int]] = []

    def walk(event: Any) -> None:
        if type(event.extra_fields).__name__ == "_ExtraFields_Allocation":
            fields = event.extra_fields
            counts.append((event.start_time_ns, fields.total_allocated, fields.alloc_size))
        for child in event.children:
            walk(child)

    for root in profiler.profiler.kineto_results.experimental_event_tree():
        walk(root)
    _, first, size = min(counts)
    return max(total for _, total, _ in counts) - (first - size)


def real(student: Any, teacher: Any, checkpointing: bool) -> tuple[int, int]:
    """Bytes that forward and backward of a real model hold at their fullest, beyond weights and gradients."""
    traced = work(student, teacher)
    model = AutoModelForCausalLM.from_config(student, dtype=torch.float32)
    beside = None
    if teacher is not None:
        frozen = AutoModelForCausalLM.from_config(teacher, dtype=torch.float32).eval().requires_grad_(False)
        beside = Resident(frozen, Opening(VOCABULARY))
    module = LanguageModel(
        load_student=lambda: model,
        load_teacher=None if beside is None else lambda: beside,
        objective=traced.objective,
        optimizer=traced.optimizer,
        schedule=lambda *_: None,
        weight_decay=0.0,
        max_steps=1,
        vocabulary=VOCABULARY,
        packed=True,
        seed=0,
        log_every_steps=1,
        activation_checkpointing=checkpointing,
    )
    module.configure_model()
    module.student.train()
    module._trainer = SimpleNamespace(accumulate_grad_batches=1, global_step=0, global_rank=0, world_size=1)  # type: ignore[assignment]
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH))
    positions = torch.arange(LENGTH // 2).repeat(ROWS, 2)  # two documents a row
    tokens = {"input_ids": ids, "position_ids": positions, "targets": ids.clone()}
    batch = {**tokens, "sequences": [0], "step_tokens": ids.numel(), "tokens_of_step": ids.numel()}
    module.training_step(batch, 0).backward()  # gradients are there from now on
    kept: list[Any] = []
    forward = allocated(lambda: kept.append(module.training_step(batch, 0)))
    both = allocated(lambda: (module.training_step(batch, 0)).backward())
    return forward, both


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("taught", [False, True], ids=["plain", "taught"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_a_traced_step_holds_what_a_real_one_holds(taught: bool, checkpointing: bool) -> None:
    teacher = llama(4, hidden_size=128) if taught else None
    step = trace(work(llama(), teacher, activation_checkpointing=checkpointing), "float32", "cpu")
    forward, both = real(llama(), teacher, checkpointing)
    assert sum(step.forward.values()) == pytest.approx(forward, rel=0.02)
    fullest = max(sum(step.forward.values()), sum(step.backward.values()))
    assert fullest == pytest.approx(both, rel=0.02)


def test_parameters_gradients_and_moments_are_exact() -> None:
    step = trace(work(llama(), llama(4)), "float32", "cpu")
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(llama()).parameters())
    assert step.trained == parameters
    assert step.trained_bytes == 4 * parameters
    assert step.optimizer_bytes == pytest.approx(8 * parameters, rel=1e-3)  # a counter each beside them
    assert step.teacher == sum(p.numel() for p in AutoModelForCausalLM.from_config(llama(4)).parameters())


def test_adapters_alone_have_gradients_and_moments() -> None:
    from models.lora import Lora

    whole = work(llama())
    lora = Lora(r=4)
    adapted = replace(whole, student=lambda: lora.attach(made(llama(), torch.float32), 0))
    step = trace(adapted, "float32", "cpu")
    model = AutoModelForCausalLM.from_config(llama())
    assert step.frozen == sum(p.numel() for p in model.parameters())
    assert step.trained == lora.parameters(model)
    assert step.optimizer_bytes == pytest.approx(8 * step.trained, rel=0.01)


def test_operations_are_those_of_the_textbook() -> None:
    """Two for every weight of a matrix and token forward, four backward; attention 4 · T² · width a layer, and the
    teacher forward alone. The head's products are made in the loss: logits of both, and two gradients."""
    student, teacher = llama(), llama(5)
    step = trace(work(student, teacher), "float32", "cpu")
    tokens = ROWS * LENGTH

    def body(config: Any) -> int:
        h, m, kv = config.hidden_size, config.intermediate_size, config.hidden_size // 2
        matrices = 2 * h * h + 2 * h * kv + 3 * h * m
        return config.num_hidden_layers * (2 * tokens * matrices + 4 * ROWS * LENGTH**2 * h)

    head = 2 * tokens * student.hidden_size * VOCABULARY
    assert step.flops[TEACHER] == body(teacher)
    assert step.flops[ENGINE] == 4 * head
    others = sum(step.flops.values()) - step.flops[TEACHER] - step.flops[ENGINE]
    assert others == pytest.approx(3 * body(student), rel=0.05)  # attention's backward takes 2.5 times its forward


def test_activation_checkpointing_computes_the_forward_again() -> None:
    plain, again = (
        sum(trace(work(llama(), activation_checkpointing=on), "float32", "cpu").flops.values()) for on in (False, True)
    )
    body = trace(work(llama()), "float32", "cpu").flops["activations"]
    last = 3 * 2 * ROWS * LENGTH * 160 * 64  # of every layer the last product, which no backward asks for
    assert again - plain == body - last


def test_a_deep_model_is_what_two_shallow_ones_say() -> None:
    config = llama(7)
    first, second = depths(config) or (0, 0)
    steps = [trace(work(shallow(config, depth)), "float32", "cpu") for depth in (first, second)]
    grown = deepened(steps.__getitem__, 7 - first, 0)
    whole = trace(work(config), "float32", "cpu")
    for name in ("trained", "trained_bytes", "weight_bytes", "optimizer_bytes"):
        assert getattr(grown, name) == pytest.approx(getattr(whole, name), rel=1e-4)
    for name in ("forward", "backward", "flops"):
        assert sum(getattr(grown, name).values()) == pytest.approx(sum(getattr(whole, name).values()), rel=0.01)


def test_a_model_of_unlike_layers_is_traced_whole() -> None:
    config = AutoConfig.for_model(
        "gemma2", num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3
    )
    config.hidden_size, config.intermediate_size, config.vocab_size = 64, 128, VOCABULARY
    assert depths(config) is None


def test_bf16_weights_hold_half() -> None:
    steps: dict[str, Step] = {compute: trace(work(llama()), compute, "cuda") for compute in ("float32", "bfloat16")}
    assert steps["bfloat16"].trained_bytes * 2 == steps["float32"].trained_bytes
    assert sum(steps["bfloat16"].forward.values()) < sum(steps["float32"].forward.values())


def test_keys_and_values_are_as_long_as_what_was_read_and_written() -> None:
    config = llama()
    done = write(config, torch.bfloat16, rows=3, prompt=20, new=12)
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * 16 * 2  # keys and values, heads of 16, bf16
    assert done.cache_bytes == 3 * 32 * a_token


def test_reading_takes_two_operations_a_weight_and_token() -> None:
    config = llama(vocab_size=8)
    done = read(config, torch.float32, rows=1, length=8)
    matrices = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters() if p.dim() == 2)
    attention = 4 * config.num_hidden_layers * 8**2 * config.hidden_size
    assert done.flops == 2 * 8 * (matrices - 8 * config.hidden_size) + attention  # the input table is looked up
