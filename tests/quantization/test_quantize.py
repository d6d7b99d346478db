"""The stage quantize as it is run: what is on disk is quantized, and opens anywhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.experts import LEAST_TOKENS
from models.layerwise import Turn
from models.quantization.methods.gptq import GPTQ
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.stored import QuantizedWeights, read_quantized
from pipeline.check import check
from pipeline.stages import quantize
from pipeline.steps.layer_by_layer import FinishedLayers
from tests.command import weights
from tests.pruning.families import model_of
from tests.quantization.little import EXPERIMENT, activations, folder_of, teacher_in, without_a_way_to_the_last
from tests.staged import manifest


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teacher_in(tmp_path_factory.mktemp("quantize") / "run")


@pytest.fixture(scope="module")
def made(teacher: Path) -> Path:
    return EXPERIMENT.make(teacher.parent, "quantize", f"model.path={teacher}")


def test_every_matrix_is_integers_times_the_scales_beside_them(teacher: Path, made: Path) -> None:
    whole, quantized = weights(teacher), weights(made)
    assert whole.keys() == quantized.keys()
    names = [name for name, tensor in whole.items() if name.startswith("model.layers.") and tensor.ndim == 2]
    assert len(names) == 2 * 7
    with safe_open(made / "quantized.safetensors", "pt") as file:
        assert json.loads(file.metadata()["quantization"])["scheme"]["weights"]["bits"] == 4
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
    quantized = sum(whole[name].numel() for name in names)
    numbers = sum(tensor.numel() for tensor in whole.values())
    bits = (quantized * (4 + 16 / 16) + (numbers - quantized) * 32) / numbers
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
    teacher: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", f"model.path={teacher}")
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
        assert "continues after" not in capsys.readouterr().out
        stage.run(context)
    assert "quantize: continues after 1 of 2 layers" in capsys.readouterr().out
    assert count[0] == 10 + 7  # the first layer was kept
    for name in ("model.safetensors", "quantized.safetensors"):
        assert (context.out / name).read_bytes() == (made / name).read_bytes()


@pytest.mark.parametrize(
    ("owner", "name", "call", "left"),
    [
        (QuantizedWeights, "write", 2, 7),  # the second layer is made
        (FinishedLayers, "keep", 2, 7),  # and its integers are written
        (quantize, "save_model", 1, 0),
        (quantize, "check_held", 1, 0),
    ],
    ids=str,
)
def test_so_does_one_that_was_killed_elsewhere(
    owner: Any, name: str, call: int, left: int, teacher: Path, made: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", f"model.path={teacher}")
    stage.prepare(context)
    plain, calls = getattr(owner, name), [0]

    def dies(*words: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise KeyboardInterrupt
        return plain(*words)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
    assert not context.out.exists()
    again = []
    whole = GPTQ.quantized
    monkeypatch.setattr(GPTQ, "quantized", lambda *words: again.append(1) or whole(*words))
    stage.run(context)
    assert len(again) == left
    for file in ("model.safetensors", "quantized.safetensors"):
        assert (context.out / file).read_bytes() == (made / file).read_bytes()


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16_tensor", "w4a16_g32", "w4a16_g128_asymmetric", "w2a16_g32"])
@pytest.mark.parametrize("method", ["round_to_nearest", "clipped", "gptq", "awq", "smoothquant"])
def test_every_scheme_and_quantizer_is_held_on_disk(teacher: Path, tmp_path: Path, scheme: str, method: str) -> None:
    words = [
        f"model.path={teacher}", f"quantizer={method}", f"scheme={scheme}",
        "stages.quantize.dtype=bfloat16",
    ]  # fmt: skip
    if "_g" not in scheme:
        words.append("scheme.weights.group_size=null")
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
        f"model.path={folder}", "scheme.weights.group_size=4", f"quantizer={method}",
    ]  # fmt: skip
    made = EXPERIMENT.make(tmp_path / "run", "quantize", *words)
    with safe_open(made / "quantized.safetensors", "pt") as file:
        for name in [key.removesuffix(".integers") for key in file.keys() if key.endswith(".integers")]:
            integers, scale = file.get_tensor(f"{name}.integers"), file.get_tensor(f"{name}.scale").float()
            want = integers.float() * scale.repeat_interleave(4, 1)  # [O, I]: what an output reads lies in a row
            tensor = weights(made)[name]
            assert torch.equal(tensor.T if family == "gpt2" else tensor, want)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scheme.weights.bits=3.5"], r"stages\.quantize\.scheme\.weights\.bits=3\.5: need a whole number"),
        (["scheme.weights.bits=true"], r"scheme\.weights\.bits=True: need a whole number"),
        (["scheme.weights.group_size=32.0"], r"scheme\.weights\.group_size=32\.0: need a whole number or null"),
        (["scheme.weights.symmetric=maybe"], r"scheme\.weights\.symmetric=maybe: need true or false"),
        (["quantizer.damping=much"], r"quantizer\.damping=much: need a number"),
        (["stages.quantize.skip=down_proj"], r"stages\.quantize\.skip=down_proj: need a list"),
        (["scheme.weights.bits=9"], r"scheme\.weights\.bits=9: need 2 to 8"),
        (["scheme.weights.group_size=128"], r"has 32 inputs, which it does not divide; need 16 or 8 or 4 or"),
        (["stages.quantize.skip=[w_proj]"], "the layers have no matrix w_proj"),
        (["stages.quantize.calibration.length=5000"], "the model reads at most 512 tokens"),
        (["stages.quantize.calibration.samples=0"], "need at least 1"),
        (["stages.quantize.dtype=int8"], "need one of float32"),
        ([*activations("w8a8"), "scheme.activations.bits=3"], r"activations\.bits=3: need 4 to 8"),
        (["quantizer=awq", "quantizer.ratios=0"], r"quantizer\.ratios=0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    teacher: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    config = EXPERIMENT.composed(tmp_path, f"model.path={teacher}", *words)
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": config, "stages": ["quantize"]})
    assert "\n" not in str(refused.value)


def test_experts_that_are_left_as_they_are_stand_in_the_plan(teacher: Path, tmp_path: Path) -> None:
    sizes = {"num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 48, "num_local_experts": 4}
    folder = tmp_path / "jetmoe"
    model_of(
        "jetmoe", dtype=torch.float32, **sizes, num_experts_per_tok=2, max_position_embeddings=512
    ).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(teacher / name, folder / name)
    for path, told in ((folder, ["12 parameters with three dimensions (mlp.input_linear.weight"]), (teacher, [])):
        config = EXPERIMENT.composed(tmp_path, f"model.path={path}", "quantizer=round_to_nearest")
        (entry,) = check({"config": config, "stages": ["quantize"]})["plan"]
        found = [warning for warning in entry["warnings"] if "three dimensions" in warning]
        assert [warning[: len(told[0])] for warning in found] == told


def test_too_little_text_is_refused(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"need 25,600,000 tokens, and data\.train has"):
        EXPERIMENT.make(tmp_path, "quantize", f"model.path={teacher}", "stages.quantize.calibration.samples=800000")


def test_text_that_no_tokenizer_makes_enough_of_is_refused_before_a_weight_is_read(
    teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "few.txt").write_text("few words\n")
    words = [f"model.path={teacher}", "data=files", f"data.train={tmp_path / 'few.txt'}", "data.holdout=0"]
    with pytest.raises(Refusal, match=r"need 384 tokens, and data\.train has 20 at most; take fewer"):
        check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["quantize"]})


def test_one_document_leaves_nothing_to_measure_on_which_is_refused_before_a_weight_is_read(
    teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "once upon a time " * 99}) + "\n")
    words = [f"model.path={teacher}", "data=files", f"data.train={tmp_path / 'one.jsonl'}"]
    with pytest.raises(Refusal, match=r"nothing falls to test; give data\.test, or hold out more"):
        check({"config": EXPERIMENT.composed(tmp_path, *words), "stages": ["quantize", "evaluate"]})


def test_a_model_that_is_packed_already_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    shutil.copytree(teacher, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "config_groups": {}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refusal, match="its weights are packed; give the model it was made of"):
        check({"config": EXPERIMENT.composed(tmp_path, f"model.path={folder}"), "stages": ["quantize"]})


def test_a_quantized_model_is_not_rounded_twice(made: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="its weights are quantized already; give the model it was made of"):
        check({"config": EXPERIMENT.composed(tmp_path, f"model.path={made}"), "stages": ["quantize"]})


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_nothing_is_routed_to_is_rounded_to_nearest_and_told(
    method: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run is killed after its first layer: what was routed there is known to the one that goes on."""
    folder = without_a_way_to_the_last(teacher, tmp_path)
    words = [f"model.path={folder}", "scheme.weights.group_size=4", f"quantizer={method}"]
    stage, context = EXPERIMENT.begin(tmp_path / "run", "quantize", *words)
    stage.prepare(context)
    plain = Turn.read

    def dies(self: Turn, *given: Any) -> Any:
        if self.number == 1:
            raise KeyboardInterrupt
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Turn, "read", dies)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
    stage.run(context)
    scheme = stage.scheme.weights
    made, held = context.out, read_quantized(context.out / "quantized.safetensors").matrices
    before, after = (AutoModelForCausalLM.from_pretrained(each) for each in (folder, made))
    for number, (was, now) in enumerate(zip(before.model.layers, after.model.layers, strict=True)):
        # AWQ rounds what its norm's scale has left of it; the other half of the experts is scaled by nothing.
        s_I = was.post_attention_layernorm.weight / now.post_attention_layernorm.weight
        assert bool((s_I == 1).all()) == (method == "gptq")
        name = f"model.layers.{number}.mlp.experts"
        up, down = was.mlp.experts.gate_up_proj[3], was.mlp.experts.down_proj[3]
        want = RoundToNearest().quantized(down.detach(), scheme, None)
        assert torch.equal(held[f"{name}.down_proj[3]"].integers, want.integers)
        assert torch.equal(now.mlp.experts.down_proj[3], want.dequantized())
        want = RoundToNearest().quantized((up * s_I).detach(), scheme, None)
        differing = (held[f"{name}.gate_up_proj[3]"].integers != want.integers).float().mean()
        assert differing == 0 if method == "gptq" else differing < 0.005
        other = RoundToNearest().quantized(was.mlp.experts.down_proj[0].detach(), scheme, None)
        assert not torch.equal(held[f"{name}.down_proj[0]"].integers, other.integers)
    told = manifest(made)["metrics"]["experts"]
    unreached = {f"model.layers.{n}.mlp.experts.{own}[3]": 0 for n in range(3) for own in ("gate_up_proj", "down_proj")}
    assert told["matrices"] == 3 * 4 * 2
    assert told["round_to_nearest"] == len(told["too_few_tokens"])
    assert unreached.items() <= told["too_few_tokens"].items()
    assert all(tokens < LEAST_TOKENS for tokens in told["too_few_tokens"].values())
    assert told["tokens"]["fewest"] == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "round to nearest" in line]
    assert re.match(rf"quantize: {told['round_to_nearest']} of 24 matrices of experts were made by round to near", line)
    assert "stages.quantize.calibration.samples" in line
