"""The arithmetic of a training step, against what PyTorch counts while the models run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, Qwen3Config

from models.training.costs import Arithmetic, Forward, peak_flops

T, V = 12, 50
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "wide heads": Qwen3Config(**SMALL, head_dim=16),
    "gpt2": GPT2Config(vocab_size=V, n_embd=32, n_layer=3, n_head=4),
}


def counted(config: Any, backward: bool = False) -> tuple[float, float]:
    """(all, those of attention) that PyTorch counts on one row; its attention is not causal."""
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=torch.arange(T)[None], use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops(), counter.get_flop_counts()["Global"].get(torch.ops.aten.bmm, 0)


def batch(predicted: int = T) -> dict[str, Any]:
    targets = torch.full((1, T), -100)
    targets[0, T - predicted :] = 1
    return {"targets": targets, "position_ids": torch.arange(T)[None], "input_ids": torch.arange(T)[None]}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_is_what_pytorch_counts(name: str) -> None:
    total, attended = counted(CONFIGS[name])
    forward = Forward.of(CONFIGS[name])
    assert forward is not None
    assert float(forward.linear(torch.tensor(T), torch.tensor(T))) == total - attended
    causal = float(forward.attended(torch.arange(T)[None], torch.ones(1, T, dtype=torch.bool)))
    assert causal == attended * (T * (T + 1) / 2) / T**2


def test_training_is_what_pytorch_counts_forward_and_backward() -> None:
    total, attended = counted(CONFIGS["llama"], backward=True)
    taught, taught_attended = counted(CONFIGS["wide heads"])
    student, teacher = Forward.of(CONFIGS["llama"]), Forward.of(CONFIGS["wide heads"])
    assert student is not None
    causal = (T * (T + 1) / 2) / T**2
    alone = float(Arithmetic(student, False, None).of(batch()))
    assert alone == pytest.approx(total - attended + causal * attended, rel=1e-12)
    both = float(Arithmetic(student, False, teacher).of(batch()))
    assert both - alone == pytest.approx(taught - taught_attended + causal * taught_attended, rel=1e-12)


def test_of_frozen_matrices_no_gradient_is_counted() -> None:
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager")
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    embedded = torch.randn(1, T, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    attended = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    student = Forward.of(CONFIGS["llama"])
    assert student is not None
    causal = (T * (T + 1) / 2) / T**2
    found = float(Arithmetic(student, True, None).of(batch()))
    assert found == pytest.approx(counter.get_total_flops() - attended + causal * attended, rel=1e-12)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    more = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixture, dense = Forward.of(MixtralConfig(**more)), Forward.of(MistralConfig(**SMALL))
    assert mixture is not None
    assert dense is not None
    router, expert = 4 * 32, 3 * 32 * 48
    assert mixture.body - dense.body == 3 * (router + expert)  # two experts in place of one MLP


def test_documents_do_not_see_each_other_and_windows_end() -> None:
    forward = Forward(0, 0, [(16, None), (16, 2)])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    seen, windowed = 1 + 2 + 3 + 1 + 2 + 3, 1 + 2 + 2 + 1 + 2 + 2
    found = float(forward.attended(positions, torch.ones_like(positions, dtype=torch.bool)))
    assert found == 4 * 16 * (seen + windowed)


def test_padding_and_tokens_that_no_target_depends_on_count_for_nothing() -> None:
    student = Forward.of(CONFIGS["llama"])
    assert student is not None
    arithmetic, plain = Arithmetic(student, False, None), batch()
    padded = {
        "targets": torch.cat([plain["targets"], torch.full((1, 5), -100)], 1),
        "position_ids": torch.cat([plain["position_ids"], torch.arange(5)[None]], 1),
    }
    assert float(arithmetic.of(padded)) == float(arithmetic.of(plain))
    leading = {name: each.roll(5, 1) for name, each in padded.items()}
    assert float(arithmetic.of(leading)) == float(arithmetic.of(plain))
    cut = {**plain, "targets": plain["targets"].clone()}
    cut["targets"][0, 7:] = -100
    assert float(arithmetic.of(cut)) == float(arithmetic.of({name: each[:, :7] for name, each in plain.items()}))
    assert float(arithmetic.of(batch(predicted=0))) == 0


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H200", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H200", "32-true", False, 66.9e12),
        ("NVIDIA A100-SXM4-80GB", "32-true", True, 156e12),
        ("NVIDIA H100 PCIe", "bf16-mixed", False, 756e12),
        ("NVIDIA GeForce RTX 4090", "bf16-mixed", False, 165.2e12),
        ("NVIDIA A100 80GB PCIe", "bf16-mixed", False, 312e12),
        ("NVIDIA RTX A1000", "bf16-mixed", False, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16-mixed", False, None),
        ("NVIDIA GeForce RTX 4090 D", "bf16-mixed", False, None),
        ("Some Device 3000", "bf16-mixed", False, None),
    ],
)
def test_peaks_are_dense_ones_of_the_data_sheet(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    assert peak_flops(name, precision, tf32) == peak
