"""A teacher in int8 or NF4: less memory, and the signal of exactly these weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes import functional
from transformers import LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.load import load_model
from models.teachers.online import Online, Resident
from models.teachers.teacher import Opening
from pipeline.check import check
from tests.staged import Experiment

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*torch.distributed")
IDS = torch.arange(5, 25).view(2, 10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("packed") / "teacher"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).save_pretrained(path)  # fmt: skip
    return path


def opened(folder: Path, weights: str | None) -> Resident:
    teacher = Online(str(folder), weights=weights).open(Opening(60, packed=False))
    assert isinstance(teacher, Resident)
    return teacher


def test_nf4_is_what_bitsandbytes_says_of_every_matrix(folder: Path) -> None:
    plain = load_model(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "_proj" in name:
                packed, state = functional.quantize_4bit(parameter.detach(), quant_type="nf4")
                parameter.copy_(functional.dequantize_4bit(packed, state))
    teacher = opened(folder, "nf4")
    teacher.check()
    for _ in range(2):  # the second forward too: nothing is rearranged
        torch.testing.assert_close(teacher.model(IDS).logits, plain(IDS).logits, atol=1e-5, rtol=1e-5)
    whole = load_model(str(folder), dtype=torch.float32).get_memory_footprint()
    assert teacher.model.get_memory_footprint() < 0.35 * whole


def test_int8_is_within_its_rounding_of_the_plain_model(folder: Path) -> None:
    """Rows of weights and of activations by their largest magnitude, in 8 bits each: under one per cent."""
    plain, teacher = load_model(str(folder), dtype=torch.float32).eval(), opened(folder, "int8")
    assert teacher.model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    want, got = plain(IDS).logits, teacher.model(IDS).logits
    apart = ((got - want).norm() / want.norm()).detach()
    assert 1e-4 < float(apart) < 2e-2
    assert teacher.model.get_memory_footprint() < 0.5 * plain.get_memory_footprint()
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("weights", ["nf4", "int8"])
def test_a_student_is_trained_by_it(weights: str, folder: Path, tmp_path: Path) -> None:
    little = ["data.max_documents=40", "data.max_length=32", "trainer.accelerator=cpu", "logger=none"]
    experiment = Experiment(
        "quickstart",
        [*little, "stages.pretrain.tokenizer.vocab_size=300", "stages.pretrain.training.max_steps=2",
         "stages.distill.training.max_steps=3", f"teacher.weights={weights}",
         "stages.distill.training.validate_every_steps=3", "student.shape.hidden_size=32"],
    )  # fmt: skip
    experiment.make(tmp_path, "pretrain")
    made = experiment.make(tmp_path, "distill")
    state = load_model(str(made), dtype=torch.float32).state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())
    config = experiment.composed(tmp_path, "strategy=zero3")
    with pytest.raises(Refusal, match="packed weights are not sharded; use strategy=zero2"):
        check({"config": config, "stages": ["distill"]})


def test_other_packings_are_refused() -> None:
    with pytest.raises(Refusal, match=r"teacher\.weights=int5: need one of int8, nf4, or null"):
        Online("somewhere", weights="int5")
