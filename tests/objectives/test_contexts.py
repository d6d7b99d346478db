"""A teacher that reads more than the student: its signal against dense formulas, by every source."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from models.heads import head_of
from models.objectives.chunked import objective_sum
from models.objectives.contexts import Contexts, in_students_order
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.representation import Wanted
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Dense
from models.teachers.online import Resident
from models.teachers.teacher import Opening
from pipeline.data.batch import collate
from tests.fitting import VOCABULARY, model

IGNORED = -100
PREFIX = list(range(1, 21))


def row(prompt: list[int], answer: list[int], *teachers: list[int]) -> dict[str, Any]:
    def side(prompt: list[int]) -> list[int]:
        return [IGNORED] * (len(prompt) - 1) + answer + [IGNORED]

    made = {"input_ids": prompt + answer, "position_ids": [*range(len(prompt + answer))], "targets": side(prompt)}
    if teachers:
        made["teacher_input_ids"] = [t for each in teachers for t in each + answer]
        made["teacher_position_ids"] = [p for each in teachers for p in range(len(each + answer))]
        made["teacher_targets"] = [t for each in teachers for t in side(each)]
    return made


def rows(draws: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    made = []
    for length, answered in ((3, 4), (5, 2), (2, 6)):
        prompt = tokens(length)
        made.append(row(prompt, tokens(answered), *(PREFIX + tokens(draw) + prompt for draw in range(draws))))
    return made


def resident(prefix: tuple[int, ...] = ()) -> Resident:
    teacher = model(32, 2, seed=2).eval().requires_grad_(False)
    made = Resident(teacher, Opening(VOCABULARY, prefix=prefix))
    made.check()
    return made


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("divergence", [ForwardKL(2.0), ReverseKL(1.0), JensenShannon(1.0)])
def test_the_signal_is_the_mean_of_what_the_teacher_says_behind_its_own_prompts(draws: int, divergence: Any) -> None:
    made, teacher, student = rows(draws), resident(), model(16, 2, seed=1)
    batch = collate(made, pad_token=0)
    objective = Distillation(0.0, divergence)
    hidden = student.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    got, _ = teacher.give(
        teacher.look(batch, Wanted()),
        lambda signal: objective_sum(objective, hidden, head_of(student), batch["targets"], signal),
    )
    got.backward()
    gradient = student.lm_head.weight.grad.clone()
    student.zero_grad()

    temperature, total = divergence.temperature, torch.zeros(())
    for one in made:
        answered = [t for t in one["targets"] if t != IGNORED]
        starts = [at for at, p in enumerate(one["teacher_position_ids"]) if p == 0] + [len(one["teacher_input_ids"])]
        told = []
        for begin, end in pairwise(starts):  # each prompt by itself, whole logits
            logits = teacher.model(torch.tensor([one["teacher_input_ids"][begin:end]])).logits[0]
            told.append((logits[-len(answered) - 1 : -1] / temperature).softmax(-1))
        p = torch.stack(told).mean(0)
        logits = student(torch.tensor([one["input_ids"]])).logits[0, -len(answered) - 1 : -1]
        q = (logits / temperature).softmax(-1)
        m = (p + q) / 2
        value = {
            "forward_kl": (p * (p.log() - q.log())).sum(),
            "reverse_kl": (q * (q.log() - p.log())).sum(),
            "jensen_shannon": ((p * (p.log() - m.log())).sum() + (q * (q.log() - m.log())).sum()) / 2,
        }[divergence.name]
        total = total + divergence.temperature**2 * value
    total.backward()
    torch.testing.assert_close(got, total, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, student.lm_head.weight.grad, rtol=1e-4, atol=1e-5)


def test_where_the_teacher_reads_what_the_student_reads_it_is_plain_distillation_to_the_bit() -> None:
    plain = [{k: v for k, v in one.items() if not k.startswith("teacher")} for one in rows()]
    shown = [
        row(one["input_ids"][:at], one["input_ids"][at:], one["input_ids"][:at])
        for one, at in zip(plain, (3, 5, 2), strict=True)
    ]
    results = []
    for made in (plain, shown):
        batch, teacher, student = collate(made, pad_token=0), resident(), model(16, 2, seed=1)
        hidden = student.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
        total, _ = teacher.give(
            teacher.look(batch, Wanted()),
            lambda signal, hidden=hidden, batch=batch, student=student: objective_sum(
                Distillation(0.3, ForwardKL(2.0)), hidden, head_of(student), batch["targets"], signal
            ),
        )
        total.backward()
        results.append((total.detach(), *(p.grad for p in student.parameters())))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_another_demonstration_changes_the_teachers_signal_and_not_the_students_input() -> None:
    made = rows()
    other = [{**one, "teacher_input_ids": [7, 8, *one["teacher_input_ids"][2:]]} for one in made]
    batches = [collate(each, pad_token=0) for each in (made, other)]
    for name in ("input_ids", "position_ids", "targets"):
        assert torch.equal(batches[0][name], batches[1][name])
    teacher = resident()
    looks = [teacher.look(batch, Wanted()).hidden for batch in batches]
    assert not torch.allclose(looks[0], looks[1], atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_going_on_from_the_shared_prefix_is_the_full_forward(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if family == "llama":
        teacher = model(32, 2, seed=2)
    else:
        from transformers import AutoConfig

        sizes: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0}
        if family == "gemma2":
            sizes |= {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6}
        torch.manual_seed(0)
        teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    teacher = teacher.eval().requires_grad_(False)
    batch = collate(rows(), pad_token=0)
    plain = Resident(teacher, Opening(VOCABULARY))
    short = Resident(teacher, Opening(VOCABULARY, prefix=PREFIX))
    plain.check(), short.check()
    assert short.prefix is not None
    widths: list[int] = []
    run = short._run
    monkeypatch.setattr(
        short, "_run", lambda ids, positions, past: (widths.append(ids.shape[1]), run(ids, positions, past))[1]
    )
    for _ in range(2):  # the cache is as good for the next batch
        got, want = (each.look(batch, Wanted()).hidden for each in (short, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert widths == [batch["teacher_input_ids"].shape[1] - len(PREFIX)] * 2  # the prefix itself is not read again


def test_where_a_texts_length_turns_its_positions_the_prefix_is_read_every_time() -> None:
    """Behind a limit such a model reads all of a text otherwise, so what a short prefix proves is not true there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made = []
    for kind in ("default", "dynamic"):
        torch.manual_seed(0)
        rope = {"rope_type": kind, "rope_theta": 10000.0, **({"factor": 4.0} if kind == "dynamic" else {})}
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
            max_position_embeddings=24, rope_parameters=rope,
        )  # fmt: skip
        teacher = LlamaForCausalLM(config).eval().requires_grad_(False)
        batch = collate(rows(), pad_token=0)
        assert batch["teacher_input_ids"].shape[1] > 24 > len(PREFIX)
        plain = Resident(teacher, Opening(VOCABULARY))
        short = Resident(teacher, Opening(VOCABULARY, prefix=PREFIX))
        plain.check(), short.check()
        made.append(short.prefix is not None)
        got, want = (each.look(batch, Wanted()).hidden for each in (short, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert made == [True, False]


def test_unequal_counts_are_refused() -> None:
    hidden, targets = torch.zeros(1, 4, 2), torch.tensor([[1, 2, IGNORED, IGNORED]])
    with pytest.raises(ValueError, match="lead to 3 tokens, and 2 are supervised"):
        in_students_order(hidden, torch.tensor([[1, 2, 3, IGNORED]]), targets)


def test_the_mean_of_one_prompt_is_that_prompts_distribution_at_every_temperature() -> None:
    hidden, weight = torch.randn(5, 8), torch.randn(VOCABULARY, 8)
    student, head = torch.randn(5, 8), Head(torch.randn(VOCABULARY, 8))
    targets = torch.arange(5)
    for temperature in (1.0, 3.0):
        objective = Distillation(0.0, ForwardKL(temperature))
        one, _ = objective_sum(objective, student, head, targets, Dense(hidden, Head(weight)))
        three, _ = objective_sum(objective, student, head, targets, Contexts(hidden.expand(3, 5, 8), Head(weight)))
        torch.testing.assert_close(one, three, rtol=1e-5, atol=1e-5)
