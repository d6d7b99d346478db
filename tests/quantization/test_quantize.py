"""The stage quantize as it is run: what is on disk is on the grid, and opens anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from models.errors import Refusal
from models.quantization.activations import Activations, attach
from models.quantization.methods.gptq import GPTQ
from models.quantization.record import read_record
from pipeline.worker import check
from tests.command import weights
from tests.pruning.families import model_of
from tests.staged import Experiment, manifest

LITTLE = [
    "data=stdlib",
    "data.max_documents=60",
    "data.max_length=48",
    "stages.quantize.calibration_rows=12",
    "stages.quantize.calibration_tokens=32",
    "stages.quantize.grid.group_size=16",
    "trainer.accelerator=cpu",
    "logger=none",
]
PRETRAIN = [
    "data.max_documents=60",
    "stages.pretrain.tokenizer.vocab_size=300",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.intermediate_size=48",
    "stages.pretrain.model.num_hidden_layers=2",
    "stages.pretrain.training.max_steps=6",
    "stages.pretrain.training.validate_every_steps=6",
    "trainer.accelerator=cpu",
    "logger=none",
]
EXPERIMENT = Experiment("quantize_only", LITTLE)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Experiment("prune_recover", PRETRAIN).make(tmp_path_factory.mktemp("quantize") / "run", "pretrain")


@pytest.fixture(scope="module")
def made(teacher: Path) -> Path:
    return EXPERIMENT.make(teacher.parent, "quantize", f"teacher.path={teacher}")


def test_every_matrix_is_integers_times_the_scales_beside_them(teacher: Path, made: Path) -> None:
    whole, quantized = weights(teacher), weights(made)
    assert whole.keys() == quantized.keys()
    names = [name for name, tensor in whole.items() if name.startswith("model.layers.") and tensor.ndim == 2]
    assert len(names) == 2 * 7
    with safe_open(made / "grid.safetensors", "pt") as file:
        assert json.loads(file.metadata()["quantization"])["grid"]["bits"] == 4
        for name, tensor in quantized.items():
            if name not in names:
                assert torch.equal(tensor, whole[name]), name
                continue
            integers, scale = file.get_tensor(f"{name}.integers"), file.get_tensor(f"{name}.scale")
            assert integers.dtype == torch.int8
            assert scale.dtype == torch.float16
            assert -8 <= int(integers.min()) < int(integers.max()) <= 7
            want = integers.float() * scale.float().repeat_interleave(16, 1)
            assert torch.equal(tensor, want), name
            assert not torch.equal(tensor, whole[name])
    told = manifest(made)
    assert told["certificates"] == {"weights_bit_equal": True}
    on_grid = sum(whole[name].numel() for name in names)
    numbers = sum(tensor.numel() for tensor in whole.values())
    bits = (on_grid * (4 + 16 / 16) + (numbers - on_grid) * 32) / numbers
    assert told["metrics"]["bits_per_weight"] == pytest.approx(bits)


def test_it_opens_in_a_process_that_knows_nothing_of_this_project(made: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
print(torch.isfinite(model(torch.arange(3, 30)[None]).logits).all().item(), "pipeline" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code, str(made)], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_a_run_that_was_killed_between_layers_lands_on_the_same_bytes(
    teacher: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", f"teacher.path={teacher}")
    stage.prepare(context)
    plain, count = GPTQ.quantized, [0]

    def dies(self: Any, *words: Any) -> Any:
        count[0] += 1
        if count[0] == 10:
            raise KeyboardInterrupt
        return plain(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(GPTQ, "quantized", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
        stage.run(context)
    assert count[0] == 10 + 7  # the first layer was kept
    for name in ("model.safetensors", "grid.safetensors"):
        assert (context.out / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize(
    "grid", ["int8_channel", "int8_tensor", "int4_group32", "int4_group128_asymmetric", "int2_group32"]
)
@pytest.mark.parametrize("method", ["nearest", "clipped", "gptq", "awq", "smoothquant"])
def test_every_grid_and_method_is_held_on_disk(teacher: Path, tmp_path: Path, grid: str, method: str) -> None:
    words = [
        f"teacher.path={teacher}", f"quantizer@stages.quantize.method={method}", f"grid@stages.quantize.grid={grid}",
        "stages.quantize.dtype=bfloat16",
    ]  # fmt: skip
    if "group" not in grid:
        words.append("stages.quantize.grid.group_size=null")
    folder = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    assert manifest(folder)["certificates"] == {"weights_bit_equal": True}
    assert weights(folder)["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", ["gpt2", "phi3", "gpt_neox", "opt", "gemma2"])
def test_families_of_other_layouts_are_quantized_where_they_read(
    family: str, method: str, teacher: Path, tmp_path: Path
) -> None:
    folder = folder_of(family, teacher, tmp_path)
    words = [
        f"teacher.path={folder}", "stages.quantize.grid.group_size=4", f"quantizer@stages.quantize.method={method}",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    with safe_open(made / "grid.safetensors", "pt") as file:
        for name in [key.removesuffix(".integers") for key in file.keys() if key.endswith(".integers")]:
            integers, scale = file.get_tensor(f"{name}.integers"), file.get_tensor(f"{name}.scale").float()
            want = integers.float() * scale.repeat_interleave(4, 1)  # [O, I]: what an output reads lies in a row
            tensor = weights(made)[name]
            assert torch.equal(tensor.T if family == "gpt2" else tensor, want)


def folder_of(family: str, teacher: Path, tmp_path: Path) -> Path:
    folder = tmp_path / family
    model_of(family, dtype=torch.float32, vocab_size=300).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())
    return folder


def logits(folder: Path, rounded: bool = False) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if rounded:
        attach(model, read_record(folder / "grid.safetensors"))
    with torch.no_grad():
        return model(torch.arange(3, 43)[None]).logits


@pytest.mark.parametrize("method", ["awq", "smoothquant"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt"])
def test_scaled_weights_of_eight_bits_and_their_folded_norms_are_nearly_the_model_that_was(
    family: str, method: str, teacher: Path, tmp_path: Path
) -> None:
    folder = folder_of(family, teacher, tmp_path)
    words = [
        f"teacher.path={folder}", f"quantizer@stages.quantize.method={method}", "stages.quantize.grid.bits=8",
        "stages.quantize.grid.group_size=4",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    whole, quantized = weights(folder), weights(made)
    changed = {n for n in whole if whole[n].ndim == 1 and not torch.equal(whole[n], quantized[n])}
    assert any("norm" in name or ".ln_" in name for name in changed)
    want = logits(folder)
    assert (logits(made) - want).norm() < 0.03 * want.norm()


def activations(choice: str) -> str:
    return f"activations@stages.quantize.activations={choice}"


@pytest.mark.parametrize("choice", ["int8_token", "int8_tensor"])
@pytest.mark.parametrize("method", ["nearest", "smoothquant"])
def test_activations_are_rounded_as_the_record_says(method: str, choice: str, teacher: Path, tmp_path: Path) -> None:
    words = [
        f"teacher.path={teacher}", activations(choice), f"quantizer@stages.quantize.method={method}",
        "stages.quantize.grid.bits=8",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    record = read_record(made / "grid.safetensors")
    assert record.activations == Activations(8, dynamic=choice == "int8_token")
    prefix = "model.layers.1.self_attn."
    if choice == "int8_token":
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


def test_the_price_is_the_mean_divergence_from_the_parent_over_the_calibration_rows(
    teacher: Path, tmp_path: Path
) -> None:
    words = [f"teacher.path={teacher}", activations("int8_token"), "stages.quantize.activations.bits=4"]
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    stage.run(context)
    _, _, batches = stage._walk.open(context)
    model, parent = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (context.out, teacher))
    figures = manifest(context.out)["metrics"]
    for name in ("kl_of_weights", "kl_with_activations"):
        with torch.no_grad():
            p, q = (torch.cat([each(ids).logits for ids in batches]).log_softmax(-1) for each in (parent, model))
        assert figures[name] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
        attach(model, read_record(context.out / "grid.safetensors"))
    assert figures["kl_with_activations"] > 1.1 * figures["kl_of_weights"]


def test_a_static_scale_holds_what_the_quantized_layers_before_it_give(teacher: Path, tmp_path: Path) -> None:
    words = [f"teacher.path={teacher}", activations("int8_tensor"), "quantizer@stages.quantize.method=nearest"]
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    stage.run(context)
    _, _, batches = stage._walk.open(context)
    record = read_record(context.out / "grid.safetensors")
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
    words = [f"teacher.path={teacher}", activations("int8_tensor"), f"quantizer@stages.quantize.method={method}"]
    uninterrupted = EXPERIMENT.make(tmp_path / "whole", "quantize", *words)
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    kind = type(stage.method)
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
    for name in ("model.safetensors", "grid.safetensors"):
        assert (context.out / name).read_bytes() == (uninterrupted / name).read_bytes()
    norms = [w["model.layers.0.input_layernorm.weight"] for w in (weights(context.out), weights(teacher))]
    assert not torch.equal(*norms)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.quantize.grid.bits=9"], r"grid\.bits=9: need 2 to 8"),
        (["stages.quantize.grid.group_size=128"], r"reads 32 inputs, which it does not divide; need 32 or 16"),
        (["stages.quantize.skip=[w_proj]"], "the layers have no matrix w_proj"),
        (["stages.quantize.calibration_tokens=5000"], "the model reads at most 512 tokens"),
        (["stages.quantize.calibration_rows=0"], "need at least 1"),
        (["stages.quantize.dtype=int8"], "need one of float32"),
        ([activations("int8_token"), "stages.quantize.activations.bits=3"], r"activations\.bits=3: need 4 to 8"),
        (["quantizer@stages.quantize.method=awq", "stages.quantize.method.ratios=0"], r"quantizer\.ratios=0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    teacher: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    config = EXPERIMENT.composed(tmp_path, f"teacher.path={teacher}", *words)
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": config, "stages": ["quantize"]})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quantizer@stages.quantize.method=awq"], "AWQ: what .*experts.* reads is not seen"),
        (["quantizer@stages.quantize.method=smoothquant"], "SmoothQuant: what .*experts.* reads is not seen"),
        (
            ["quantizer@stages.quantize.method=nearest", activations("int8_token")],
            r"quantize\.activations: what .*experts.* reads is not seen.*activations=null",
        ),
    ],
)
def test_what_experts_read_is_neither_scaled_by_nor_rounded(
    words: list[str], said: str, teacher: Path, tmp_path: Path
) -> None:
    folder = folder_of("mixtral", teacher, tmp_path)
    words = [f"teacher.path={folder}", "stages.quantize.grid.group_size=4", *words]
    with pytest.raises(Refusal, match=said):
        check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["quantize"]})
    skip = "stages.quantize.skip=[mlp.experts.gate_up_proj,mlp.experts.down_proj]"
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words, skip)
    assert manifest(made)["certificates"] == {"weights_bit_equal": True}


def test_a_family_whose_parts_are_not_known_is_refused_by_methods_that_scale(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "olmo2"
    shutil.copytree(teacher, folder)
    AutoConfig.for_model(
        "olmo2", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(folder)
    config = EXPERIMENT.composed(tmp_path, f"teacher.path={folder}", "quantizer@stages.quantize.method=awq")
    with pytest.raises(Refusal, match=r"method=AWQ: .*q_norm.*use quantizer@stages\.quantize\.method=gptq"):
        check({"config": config, "stages": ["quantize"]})


def test_too_little_text_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"need 25,600,000 tokens, and data\.train has"):
        EXPERIMENT.make(tmp_path, "quantize", f"teacher.path={teacher}", "stages.quantize.calibration_rows=800000")


def test_a_model_that_is_packed_already_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="its weights are packed; give the model it was made of"):
        check({"config": EXPERIMENT.composed(tmp_path, f"teacher.path={folder}"), "stages": ["quantize"]})
