"""The stage sparsify as it is run, and zeros that stay zero in the stage after it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import Refusal
from models.load import load_model
from models.measure import likelihood_of
from models.sparsity import zeros
from models.sparsity.sparsegpt import SparseGPT
from models.training.language_model import LanguageModel
from pipeline.building import build
from pipeline.check import check
from pipeline.data.batch import collate
from pipeline.data.prepared import sequences_of
from pipeline.data.tokenizer import load_tokenizer
from pipeline.report.columns import ZEROS_NOTE
from tests.command import train, weights
from tests.optional_data import STORIES, STORIES_TEXT, needed
from tests.quantization.little import without_a_way_to_the_last
from tests.staged import Experiment, manifest

LITTLE = [
    "data.max_documents=60",
    "data.max_length=48",
    "stages.pretrain.tokenizer.vocab_size=300",
    "stages.pretrain.model.hidden_size=32",
    "stages.pretrain.model.intermediate_size=48",
    "stages.pretrain.model.num_hidden_layers=2",
    "stages.pretrain.training.max_steps=6",
    "stages.pretrain.training.validate_every_steps=6",
    "stages.sparsify.calibration.samples=12",
    "stages.sparsify.calibration.length=32",
    "stages.recover.training.max_steps=6",
    "stages.recover.training.validate_every_steps=6",
    "optimizer.lr=0.01",
    "trainer.log_every_steps=1",
    "trainer.checkpoint.every_steps=2",
    "trainer.accelerator=cpu",
    "logger=none",
]
LORA = ["lora=lora", "lora.dropout=0.0"]
LAYERS = "model.layers."


EXPERIMENT = Experiment("demo/sparsify_recover", LITTLE)
composed, begin, make = EXPERIMENT.composed, EXPERIMENT.begin, EXPERIMENT.make


def matrices_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.startswith(LAYERS) and tensor.ndim == 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparsify") / "run"
    for stage in ("pretrain", "sparsify", "recover"):
        make(folder, stage)
    return folder


def from_(made: Path, *words: str) -> list[str]:
    return [f"model.path={made / 'pretrain'}", f"stages.recover.student.path={made / 'sparsify'}", *words]


def test_two_of_four_are_left_and_nothing_else_has_changed(made: Path) -> None:
    whole, sparse = weights(made / "pretrain"), weights(made / "sparsify")
    assert whole.keys() == sparse.keys()
    for name, tensor in sparse.items():
        if name in matrices_of(made / "sparsify"):
            assert ((tensor != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all(), name
        else:
            assert torch.equal(tensor, whole[name]), name
    told = manifest(made / "sparsify")["certificates"]
    assert told["pattern_held"] is True
    assert told["zeros"]["all"] == {"zeros": 8704, "weights": 17408, "fraction": 0.5}
    assert told["zeros"]["mlp.down_proj"] == {"zeros": 1536, "weights": 3072, "fraction": 0.5}
    assert manifest(made / "sparsify")["parents"]["model"]["path"] == str(made / "pretrain")


def test_what_was_written_opens_in_a_process_that_knows_nothing_of_this_project(made: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])("The statement is")["input_ids"]])
words = {"max_new_tokens": 5, "do_sample": False}
assert torch.equal(model.generate(ids, **words), model.generate(ids, use_cache=False, **words))
print(sum(int((p == 0).sum()) for n, p in model.named_parameters() if "_proj" in n), "pipeline" in sys.modules)
"""
    for stage in ("sparsify", "recover"):
        command = [sys.executable, "-P", "-c", code, str(made / stage)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["8704", "False"]


def test_a_run_killed_between_two_layers_goes_on_and_gives_the_same_bytes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = SparseGPT.sparsified

    def failing(self: SparseGPT, *words: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:  # in the second layer
            raise KeyboardInterrupt
        return whole(self, *words)

    monkeypatch.setattr(SparseGPT, "sparsified", failing)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, "sparsify", *from_(made))
    assert not (tmp_path / "sparsify").exists()
    left = sorted(path.name for path in (tmp_path / "work" / "sparsify").glob("layer-*"))
    assert left == ["layer-00000.json", "layer-00000.safetensors"]
    calls.extend([1] * 10)
    before = len(calls)
    again = make(tmp_path, "sparsify", *from_(made))
    assert len(calls) - before == 7  # the second layer's matrices alone
    assert (again / "model.safetensors").read_bytes() == (made / "sparsify" / "model.safetensors").read_bytes()


def test_a_fraction_and_what_is_skipped(made: Path, tmp_path: Path) -> None:
    words = ["stages.sparsify.fraction=0.3", "stages.sparsify.pattern=null", "sparsity=wanda"]
    words += ["stages.sparsify.skip=[o_proj, 1.mlp.down_proj]", "stages.sparsify.dtype=bfloat16"]
    folder = make(tmp_path, "sparsify", *from_(made, *words))
    for name, tensor in matrices_of(folder).items():
        left_alone = "o_proj" in name or name.endswith("1.mlp.down_proj.weight")
        assert tensor.dtype == torch.bfloat16
        assert int((tensor == 0).sum()) == (0 if left_alone else round(0.3 * tensor.numel())), name
    told = manifest(folder)["certificates"]
    assert "pattern_held" not in told
    assert told["zeros"]["self_attn.o_proj"]["zeros"] == 0


def test_zeros_that_do_not_hold_leave_nothing_behind(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SparseGPT, "sparsified", lambda self, weight, *_: weight)
    with pytest.raises(Refusal, match=r"does not have 2:4 once reloaded; nothing was written") as refused:
        make(tmp_path, "sparsify", *from_(made))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "sparsify").exists()


def test_too_little_text_is_refused_before_a_weight_is_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.steps.layer_by_layer.load_offloaded", None)
    with pytest.raises(Refusal, match=r"calibration\.samples=90000 .* need 2,880,000 tokens, and data") as refused:
        make(tmp_path, "sparsify", *from_(made, "stages.sparsify.calibration.samples=90000"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.sparsify.fraction=0.5"], r"fraction=0\.5 and stages\.sparsify\.pattern=2:4: need one"),
        (["stages.sparsify.pattern=null"], "need one"),
        (["stages.sparsify.pattern=null", "stages.sparsify.fraction=1.0"], r"fraction=1\.0: need \(0, 1\)"),
        (["stages.sparsify.pattern='4:2'"], "pattern=4:2: need N:M with 0 < N < M"),
        (["stages.sparsify.pattern='0:4'"], "pattern=0:4: need N:M"),
        (["stages.sparsify.pattern=half"], "pattern=half: need N:M"),
        (
            ["stages.sparsify.pattern='2:5'"],
            r"layers\.0\.self_attn\.q_proj\.weight has 32 inputs, which 5 does not divide; need M of 2, 4, 8, 16, or",
        ),
        (["stages.sparsify.skip=[w_proj]"], "the layers have no matrix w_proj; they have self_attn.q_proj"),
        (["stages.sparsify.skip=[9.mlp.up_proj]"], r"no matrix 9\.mlp\.up_proj"),
        (["stages.sparsify.calibration.length=1"], r"calibration\.length=1: need at least 2"),
        (["stages.sparsify.calibration.length=4096"], "the model reads at most 512 tokens"),
        (["stages.sparsify.dtype=float8"], "dtype=float8: need one of float32"),
        (["sparsity.damping=0"], "damping=0: need a number above 0"),
        (["sparsity=magnitude", "sparsity.scope=all"], "scope=all: need layer"),
        (["stages.sparsify.model=./nowhere"], "nowhere: no such folder"),
        (["lora=lora"], r"lora\.dropout=0\.05 with stages\.recover\.keep_zeros=true: .* set lora\.dropout=0"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": composed(tmp_path, *words), "stages": ["pretrain", "sparsify", "recover"]})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_an_expert_that_nothing_is_routed_to_loses_its_smallest_weights_and_is_told(
    method: str, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = without_a_way_to_the_last(made / "pretrain", tmp_path)
    sparse = make(tmp_path / "run", "sparsify", f"model.path={folder}", f"sparsity={method}")
    whole, left = weights(folder), weights(sparse)
    told = manifest(sparse)["metrics"]["experts"]
    for number in range(3):
        for name, parts in {"w1": ("gate_up_proj", 0), "w2": ("down_proj", 0)}.items():
            expert = f"model.layers.{number}.block_sparse_moe.experts.3.{name}.weight"
            weight, now = whole[expert], left[expert]
            groups = weight.abs().unflatten(1, (-1, 4))
            want = torch.where(groups >= groups.sort(-1).values[..., 2:3], weight.unflatten(1, (-1, 4)), 0)
            assert torch.equal(now, want.flatten(1))
            assert told["too_few_tokens"][f"model.layers.{number}.mlp.experts.{parts[0]}[3]"] == 0
            assert not torch.equal(left[expert.replace("s.3.", "s.0.")], whole[expert.replace("s.3.", "s.0.")])
    assert told["magnitude"] == len(told["too_few_tokens"]) >= 6
    assert "were made by magnitude, as fewer than 32 calibration tokens" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_zeros_stay_and_the_rest_is_trained(made: Path, tmp_path: Path, words: list[str]) -> None:
    folder = make(tmp_path, "recover", *from_(made, *words))
    start = matrices_of(made / "sparsify")
    for name, tensor in matrices_of(folder).items():
        assert torch.equal(tensor == 0, start[name] == 0), name
        moved = ((tensor - start[name]).abs() > 1e-6).sum() / (start[name] != 0).sum()
        assert moved > 0.9, name
    told = manifest(folder)["certificates"]
    assert told["zeros_kept"] == {"zeros_before": 8704, "zeros_after": 8704}
    assert not (folder / "adapter").exists()
    if words:
        assert told["merged_equals_adapter"]["max_difference"] <= told["merged_equals_adapter"]["tolerance"]


def test_without_it_they_are_filled_and_the_certificate_would_say_so(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, "recover", *from_(made, "stages.recover.keep_zeros=false"))
    assert sum(int((tensor == 0).sum()) for tensor in matrices_of(folder).values()) < 100
    assert "zeros_kept" not in manifest(folder)["certificates"]
    monkeypatch.setattr(zeros, "keep", lambda model: model)
    with pytest.raises(Refusal, match=r"keep_zeros=true: .* zeros of model.* are no longer zero; nothing was written"):
        make(tmp_path / "broken", "recover", *from_(made))
    assert not (tmp_path / "broken" / "recover").exists()


@pytest.mark.parametrize("words", [[], LORA], ids=["full", "lora"])
def test_training_that_was_cut_short_goes_on_with_the_same_zeros(
    words: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tmp_path / "whole", "recover", *from_(made, *words))
    step = LanguageModel.training_step

    def failing(self: LanguageModel, *words: Any) -> Any:
        if self.trainer.global_step == 3:
            raise KeyError("power")
        return step(self, *words)

    with monkeypatch.context() as broken:
        broken.setattr(LanguageModel, "training_step", failing)
        with pytest.raises(KeyError, match="power"):
            make(tmp_path, "recover", *from_(made, *words))
    assert list((tmp_path / "work" / "recover" / "checkpoints").glob("step-00000002"))
    again = make(tmp_path, "recover", *from_(made, *words))
    assert (again / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
def test_gradients_through_a_masked_adapter_are_those_of_the_dense_formula(transposed: bool) -> None:
    from peft import LoraConfig
    from peft.tuners.lora import Linear
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    base: Any = Conv1D(5, 7) if transposed else torch.nn.Linear(7, 5)
    base = base.double().requires_grad_(False)
    base.weight[torch.rand_like(base.weight) < 0.5] = 0
    config = LoraConfig(r=2, lora_alpha=6, fan_in_fan_out=transposed)
    layer = Linear(base, "default", config, r=2, lora_alpha=6).double()
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    zeros._mask_adapter(layer)
    x, upstream = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dense = base.weight.T if transposed else base.weight
    want = x @ (dense + (dense != 0) * 3 * (b @ a)).T + base.bias
    got = layer(x)
    torch.testing.assert_close(got, want)
    gradients = torch.autograd.grad((got * upstream).sum(), [a, b])
    torch.testing.assert_close(gradients, torch.autograd.grad((want * upstream).sum(), [a, b]))
    layer.merge()
    torch.testing.assert_close(layer(x), want)
    assert torch.equal(base.weight == 0, (dense.T if transposed else dense) == 0)
    assert 0 < int((base.weight == 0).sum()) < 35


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "words"),
    [("ddp", []), ("zero1", []), ("zero2", []), ("zero3", []), ("ddp", LORA), ("zero2", LORA), ("zero3", LORA)],
    ids=lambda value: value if isinstance(value, str) else "lora" if value else "full",
)
def test_two_ranks_keep_the_zeros_that_one_keeps(strategy: str, words: list[str], made: Path, tmp_path: Path) -> None:
    alone = make(tmp_path / "one", "recover", *from_(made, *words))
    done = train(
        "+experiment=demo/sparsify_recover",
        *LITTLE,
        *from_(made, *words),
        f"run_dir={tmp_path / 'two'}",
        "stages=[recover]",
        "stages.recover.training.micro_batch=4",
        "trainer.devices=2",
        f"strategy={strategy}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    two = tmp_path / "two" / "recover"
    assert manifest(two)["certificates"]["zeros_kept"] == {"zeros_before": 8704, "zeros_after": 8704}
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_the_report_counts_zeros_and_says_what_they_are_good_for(made: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(made, run)
    speed = "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 8, new_tokens: 4, repeats: 1}"
    make(run, "evaluate", speed)
    from pipeline.report.report import write_report
    from pipeline.report.terminal import table

    report = write_report(run)
    assert {row["stage"]: row["zeros"] for row in report["rows"]} == {"pretrain": 0.0, "sparsify": 0.5, "recover": 0.5}
    text, page = (run / "report.md").read_text(), (run / "report.html").read_text()
    assert "zeros in weight matrices" in text.splitlines()[2]
    assert "50.0 %" in text
    for said in (text, page.replace("&#39;", "'")):
        assert ZEROS_NOTE in said
    assert ZEROS_NOTE in str(table(report).caption)
    shutil.rmtree(run / "evaluate")
    make(run, "evaluate", speed, "stages.evaluate.models=[pretrain]")
    write_report(run)
    assert "zeros" not in (run / "report.md").read_text()


def test_the_more_a_method_looks_at_the_less_is_lost(tmp_path: Path) -> None:
    """Perplexity of stories260K at half of its weights, on stories that were no calibration."""
    path = needed(STORIES)
    words = [
        f"model.path={path}", "data=files", f"data.train={needed(STORIES_TEXT)}",
        "data.max_documents=400", "data.max_length=256", "data.holdout=0.1", "stages.sparsify.calibration.samples=64",
        "stages.sparsify.calibration.length=128", "stages.sparsify.pattern=null", "stages.sparsify.fraction=0.5",
    ]  # fmt: skip
    config = composed(tmp_path, *words)
    rows, _, _ = sequences_of(build(config, "sparsify").data, "test", load_tokenizer(str(path)), tmp_path / "rows")
    batches = [collate([rows[n] for n in range(min(24, len(rows)))], pad_token=0)]
    lost = {}
    for method in ("sparsegpt", "wanda", "magnitude"):
        folder = make(tmp_path / method, "sparsify", *words, f"sparsity={method}")
        assert manifest(folder)["certificates"]["zeros"]["all"]["fraction"] == 0.5
        found = likelihood_of(load_model(str(folder), dtype=torch.float32).eval(), batches)
        lost[method] = found.nats / found.tokens
    print(lost)
    assert lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]
