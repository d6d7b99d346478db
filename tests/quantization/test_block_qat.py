"""ggml's own rounding in training: what is multiplied is what its file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

from models.errors import Refusal
from models.load import empty_model, load_model
from models.lora import Lora
from models.quantization.block_qat import BlockQAT
from models.quantization.stored import BlockWeights, open_quantized
from pipeline.check import check
from tests.command import weights
from tests.quantization.test_qat import EXPERIMENT, IDS
from tests.staged import manifest

WORDS = ["stages.pretrain.model.intermediate_size=64", "qat=ggml", "qat.type=q4_0"]


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", ["q4_k", "q6_k", "q5_0", "q8_0"])
@pytest.mark.parametrize("adapted", [False, True])
def test_every_forward_multiplies_with_what_ggml_reads_back(kind: str, adapted: bool, tmp_path: Path) -> None:
    model = tiny()
    rounding = BlockQAT(kind, skip=["o_proj"]).open(tmp_path, empty_model(model.config))
    if adapted:
        Lora(r=2, dropout=0.0).attach(model, 0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
    rounding.attach(model)
    trained = model(IDS).logits
    trained.logsumexp(-1).sum().backward()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and float(parameter.grad.abs().sum()) > 0 for parameter in learning)
    record = rounding.settle(model)
    torch.testing.assert_close(model(IDS).logits, trained, atol=1e-5, rtol=1e-5)
    assert isinstance(record, BlockWeights)
    assert len(record.matrices) == 6  # o_proj is left alone
    for name, blocks in record.matrices.items():
        ggml = getattr(GGMLQuantizationType, blocks.type.upper())
        np.testing.assert_array_equal(
            model.get_parameter(name).detach().numpy(), dequantize(blocks.bytes.numpy(), ggml)
        )


def test_the_gradient_is_that_of_the_rounded_weight(tmp_path: Path) -> None:
    model = tiny()
    rounding = BlockQAT("q4_k").open(tmp_path, empty_model(model.config))
    rounding.attach(model)
    module, read = model.model.layers[0].mlp.up_proj, torch.randn(5, 256)
    upstream = torch.randn(5, 256)
    (module(read) * upstream).sum().backward()
    torch.testing.assert_close(module.weight.grad, upstream.T @ read)


def test_the_stage_ends_on_blocks_that_it_can_be_read_back_from(tmp_path: Path) -> None:
    EXPERIMENT.make(tmp_path, "pretrain", *WORDS)
    words = [*WORDS, f"stages.qat.student.path={tmp_path / 'pretrain'}", f"model.path={tmp_path / 'pretrain'}"]
    assert check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["qat"]})["plan"]
    made = EXPERIMENT.make(tmp_path, "qat", *words)
    record = open_quantized(made / "quantized.safetensors")
    assert {blocks.type for blocks in record.matrices.values()} == {"q4_0"}
    start = load_model(str(tmp_path / "pretrain"), dtype=torch.float32)
    for name, blocks in record.matrices.items():
        np.testing.assert_array_equal(
            weights(made)[name].numpy(), dequantize(blocks.bytes.numpy(), GGMLQuantizationType.Q4_0)
        )
        assert not torch.equal(
            weights(made)[name], BlockQAT("q4_0").open(made, start).rule.kind.rounded(start.get_parameter(name))
        )  # it was trained, not only rounded
    told = manifest(made)
    assert told["certificates"]["weights_bit_equal"] is True
    held = sum(blocks.shape[0] * blocks.shape[1] for blocks in record.matrices.values())
    numbers = told["metrics"]["parameters"]
    assert told["metrics"]["bits_per_weight"] == pytest.approx((4.5 * held + 32 * (numbers - held)) / numbers)


def test_widths_and_starts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    EXPERIMENT.make(tmp_path, "pretrain", *WORDS)
    EXPERIMENT.make(tmp_path, "quantize", *WORDS)
    base = [*WORDS, f"model.path={tmp_path / 'pretrain'}"]
    for words, said in (
        ([f"stages.qat.student.path={tmp_path / 'quantize'}"], "quantized already and would be rounded twice"),
        ([f"stages.qat.student.path={tmp_path / 'pretrain'}", "qat.type=q4_k"], "blocks of 256 do not"),
        (["qat.type=q9_k"], "need one of q4_0"),
        ([f"stages.qat.student.path={tmp_path / 'pretrain'}", "qat.skip=[x_proj]"], "have no matrix x_proj"),
    ):
        with pytest.raises(Refusal, match=said):
            check({"config": EXPERIMENT.composed(tmp_path, *base, *words), "stages": ["qat"]})
