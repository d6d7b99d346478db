"""The stage quantize where weights are scaled first, and where activations are rounded too."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.errors import Refusal
from models.load import load_model
from models.measure import likelihood_of
from models.quantization.activations import attach
from models.quantization.scheme import Activations
from models.quantization.stored import read_quantized
from pipeline.building import build
from pipeline.check import check
from pipeline.data.batch import collate
from pipeline.data.prepared import sequences_of
from pipeline.data.tokenizer import load_tokenizer
from tests.command import weights
from tests.quantization.little import EXPERIMENT, activations, folder_of, teacher_in
from tests.staged import manifest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_in(tmp_path_factory.mktemp("quantize") / "run")


def logits(folder: Path, rounded: bool = False) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if rounded:
        attach(model, read_quantized(folder / "quantized.safetensors"))
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_scaled_weights_of_eight_bits_and_their_folded_norms_are_nearly_the_model_that_was(
    family: str, method: str, teacher: Path, tmp_path: Path
) -> None:
    folder = folder_of(family, teacher, tmp_path)
    words = [
        f"model.path={folder}", f"quantizer={method}", "scheme.weights.bits=8",
        "scheme.weights.group_size=4",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    whole, quantized = weights(folder), weights(made)
    changed = {n for n in whole if whole[n].ndim == 1 and not torch.equal(whole[n], quantized[n])}
    assert any("norm" in name or ".ln_" in name for name in changed)
    want = logits(folder)
    assert (logits(made) - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("choice", ["w8a8", "w8a8_static"])
@pytest.mark.parametrize("method", ["round_to_nearest", "smoothquant"])
def test_activations_are_rounded_as_the_scheme_says(method: str, choice: str, teacher: Path, tmp_path: Path) -> None:
    words = [
        f"model.path={teacher}", *activations(choice), f"quantizer={method}",
        "scheme.weights.bits=8",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    record = read_quantized(made / "quantized.safetensors")
    assert record.scheme.activations == Activations(8, dynamic=choice == "w8a8")
    prefix = "model.layers.1.self_attn."
    if choice == "w8a8":
        assert not record.input_scales
    else:
        assert record.input_scales.keys() == record.matrices.keys()
        shared = {float(record.input_scales[f"{prefix}{name}_proj.weight"]) for name in ("q", "k", "v")}
        assert len(shared) == 1
        assert shared != {float(record.input_scales[f"{prefix}o_proj.weight"])}
    figures = manifest(made)["metrics"]
    plain, rounded, want = logits(made), logits(made, rounded=True), logits(teacher)
    assert 0 < (rounded - plain).norm() < 0.05 * want.norm()
    assert 0 <= figures["kl_of_weights"] < 1e-3
    assert 0 < figures["kl_with_activations"] < 1e-2


def test_the_price_is_the_mean_divergence_from_the_parent_over_the_calibration_samples(
    teacher: Path, tmp_path: Path
) -> None:
    teacher = folder_of("llama", teacher, tmp_path)
    words = [f"model.path={teacher}", *activations("w8a8"), "scheme.activations.bits=4"]
    words.append("scheme.weights.group_size=4")
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    stage.run(context)
    _, _, batches = stage.layer_by_layer.open(context)
    model, parent = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (context.out, teacher))
    figures = manifest(context.out)["metrics"]
    for name in ("kl_of_weights", "kl_with_activations"):
        with torch.no_grad():
            p, q = (torch.cat([each(ids).logits for ids in batches]).log_softmax(-1) for each in (parent, model))
        assert figures[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        attach(model, read_quantized(context.out / "quantized.safetensors"))
    assert figures["kl_with_activations"] > 1.1 * figures["kl_of_weights"]


def test_a_static_scale_holds_what_the_quantized_layers_before_it_give(teacher: Path, tmp_path: Path) -> None:
    words = [f"model.path={teacher}", *activations("w8a8_static"), "quantizer=round_to_nearest"]
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    stage.run(context)
    _, _, batches = stage.layer_by_layer.open(context)
    record = read_quantized(context.out / "quantized.safetensors")
    model = AutoModelForCausalLM.from_pretrained(context.out).eval()
    # The second layer reads what the first one gives with its activations rounded, as it will be.
    first = {name: made for name, made in record.matrices.items() if ".layers.0." in name}
    attach(model, replace(record, matrices=first))
    seen: list[torch.Tensor] = []
    name = "model.layers.1.self_attn.q_proj"
    model.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].abs().max()))
    with torch.no_grad():
        for ids in batches:
            model(ids)
    assert float(record.input_scales[f"{name}.weight"]) == pytest.approx(float(max(seen)) / 127, rel=1e-5)


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_what_was_folded_before_a_kill_is_there_after_it(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"model.path={teacher}", *activations("w8a8_static"), f"quantizer={method}"]
    uninterrupted = EXPERIMENT.make(tmp_path / "whole", "quantize", *words)
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    kind = type(stage.quantizer)
    plain, count = kind.quantized, [0]

    def dies(self: Any, *given: Any) -> Any:
        count[0] += 1
        if count[0] == 10:
            raise KeyboardInterrupt
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "quantized", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
        stage.run(context)
    assert count[0] == 10 + 7  # the first layer was kept
    for name in ("model.safetensors", "quantized.safetensors"):
        assert (context.out / name).read_bytes() == (uninterrupted / name).read_bytes()
    norms = [w["model.layers.0.input_layernorm.weight"] for w in (weights(context.out), weights(teacher))]
    assert not torch.equal(*norms)


def test_what_experts_read_is_not_rounded(teacher: Path, tmp_path: Path) -> None:
    folder = folder_of("mixtral", teacher, tmp_path)
    words = [f"model.path={folder}", "scheme.weights.group_size=4", "quantizer=smoothquant", *activations("w8a8")]
    said = r"scheme=W4A8 g4 dynamic: the inputs of .*experts.* cannot be rounded.*scheme=w8a16, or skip=\[\S+\]$"
    with pytest.raises(Refusal, match=said):
        check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["quantize"]})
    skip = "stages.quantize.skip=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words, skip)
    assert manifest(made)["certificates"] == {"weights_bit_equal": True}
    assert "experts" not in manifest(made)["metrics"]


def test_a_family_whose_parts_are_not_known_is_refused_by_methods_that_scale(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "olmo2"
    shutil.copytree(teacher, folder)
    shape = AutoConfig.for_model(
        "olmo2", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    config = EXPERIMENT.composed(tmp_path, f"model.path={folder}", "quantizer=awq")
    with pytest.raises(Refusal, match=r"the quantizer AWQ: .*q_norm.*use quantizer=gptq"):
        check({"config": config, "stages": ["quantize"]})


def test_the_report_scores_it_with_its_activations_rounded(teacher: Path, tmp_path: Path) -> None:
    words = [f"model.path={teacher}", *activations("w8a8"), "scheme.activations.bits=4"]
    run = tmp_path / "run"
    made = EXPERIMENT.make(run, "quantize", *words)
    speed = "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 8, new_tokens: 4, repeats: 1}"
    EXPERIMENT.make(run, "evaluate", *words, speed, "stages.evaluate.models=[quantize]")
    (row,) = manifest(run / "evaluate")["metrics"]["rows"]
    shutil.move(made / "quantized.safetensors", tmp_path / "quantized.safetensors")
    shutil.rmtree(run / "evaluate")
    EXPERIMENT.make(run, "evaluate", *words, speed, "stages.evaluate.models=[quantize]")
    (plain,) = manifest(run / "evaluate")["metrics"]["rows"]
    assert abs(row["perplexity"] / plain["perplexity"] - 1) > 1e-5  # so little it has learnt
    model = load_model(str(made), dtype=torch.float32).eval()
    attach(model, read_quantized(tmp_path / "quantized.safetensors"))
    config = EXPERIMENT.composed(run, *words)
    rows, _, _ = sequences_of(build(config, "evaluate").data, "test", load_tokenizer(str(made)), tmp_path / "rows")
    found = likelihood_of(model, [collate([rows[n]], pad_token=0) for n in range(len(rows))])
    assert row["perplexity"] == pytest.approx(found.perplexity, rel=1e-6)
