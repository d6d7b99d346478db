"""The stages prune and recover as they are run: plans on disk, certificates, and what comes out of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.pruning import files, surgery
from models.pruning.feasible import feasible
from models.pruning.groups import Anatomy, Axis, anatomy_of
from models.pruning.importance import gather
from models.pruning.importances.taylor import Taylor
from models.pruning.plan import Wish
from models.training.language_model import LanguageModel
from models.training.saved import checkpoints
from pipeline.building import build
from pipeline.check import check
from pipeline.context import Context
from pipeline.steps.scoring import CalibrationText
from tests.command import train, weights
from tests.optional_data import STORIES, STORIES_TEXT, needed
from tests.pruning.families import config_of
from tests.pruning.test_plan import scores_of, shapes_of
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
    "stages.recover.training.max_steps=6",
    "stages.recover.training.validate_every_steps=6",
    "lora.dropout=0.0",
    "trainer.log_every_steps=1",
    "trainer.accelerator=cpu",
    "logger=none",
]


EXPERIMENT = Experiment("demo/prune_recover", LITTLE)
composed, begin, make = EXPERIMENT.composed, EXPERIMENT.begin, EXPERIMENT.make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prune") / "run"
    for stage in ("pretrain", "prune", "recover"):
        make(folder, stage)
    return folder


def test_a_pruned_model_opens_in_a_process_that_knows_nothing_of_this_project(made: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.tensor([AutoTokenizer.from_pretrained(sys.argv[1])("The statement is")["input_ids"]])
words = {"max_new_tokens": 5, "do_sample": False}
alone = model.generate(ids, **words)
assert torch.equal(alone, model.generate(ids, use_cache=False, **words))
padded = torch.cat([torch.full((1, 3), model.config.eos_token_id or 0), ids], dim=1)
mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], dim=1)
assert torch.equal(alone, model.generate(padded, attention_mask=mask, **words)[:, 3:])
logits = model(padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)).logits[:, 3:]
assert torch.allclose(logits, model(ids).logits, atol=1e-5)
print(sum(p.numel() for p in model.parameters()), "pipeline" in sys.modules)
"""
    for stage in ("prune", "recover"):
        command = [sys.executable, "-P", "-c", code, str(made / stage)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [str(manifest(made / stage)["metrics"]["parameters"]), "False"]


def test_the_certificate_and_the_plan_say_what_was_done(made: Path) -> None:
    told = manifest(made / "prune")
    proof = told["certificates"]["masked_equals_pruned"]
    assert 0 <= proof["max_difference"] <= proof["tolerance"] == pytest.approx(1e-4 * proof["largest_logit"])
    assert proof["tokens"] > 50
    plan = json.loads((made / "prune" / "plan.json").read_text())
    whole, cut = (AutoModelForCausalLM.from_pretrained(made / name) for name in ("pretrain", "prune"))
    for when, model in (("before", whole), ("after", cut)):
        assert plan[when]["parameters"] == sum(p.numel() for p in model.parameters())
    assert {name: len(units) for name, units in plan["kept"].items()} == {
        f"layers.{layer}.{kind}": count for layer in (0, 1) for kind, count in (("heads", 3), ("mlp", 36))
    }
    for name, units in plan["kept"].items():
        scores = np.array(plan["scores"][name])
        assert scores[units].min() >= np.delete(scores, units).max()
    assert cut.config.model_type == "mistral"
    saved = {stage: set(weights(made / stage)) for stage in ("pretrain", "prune", "recover")}
    assert saved["prune"] == saved["recover"] == saved["pretrain"]  # a tied table is saved once
    assert any("Mistral" in note for note in plan["notes"])


def test_a_plan_that_was_reviewed_gives_the_same_bytes_and_an_edited_one_what_it_says(
    made: Path, tmp_path: Path
) -> None:
    path = made / "prune" / "plan.json"
    words = [f"model.path={made / 'pretrain'}"]
    again = make(tmp_path / "again", "prune", *words, f"stages.prune.plan={path}")
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (made / "prune" / name).read_bytes()
    plan = json.loads(path.read_text())
    plan["kept"]["layers.0.mlp"] = list(range(36))
    (tmp_path / "edited.json").write_text(json.dumps(plan))
    edited = make(tmp_path / "edited", "prune", *words, f"stages.prune.plan={tmp_path / 'edited.json'}")
    whole, cut = (AutoModelForCausalLM.from_pretrained(folder) for folder in (made / "pretrain", edited))
    assert torch.equal(cut.model.layers[0].mlp.up_proj.weight, whole.model.layers[0].mlp.up_proj.weight[:36])


def test_layers_that_change_little_go_and_the_rest_generates(made: Path, tmp_path: Path) -> None:
    words = [
        f"model.path={made / 'pretrain'}", "importance=block_influence",
        "stages.prune.kinds=[layers]", "stages.prune.kept_fraction=0.5",
    ]  # fmt: skip
    folder = make(tmp_path / "run", "prune", *words)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["kept"]["layers"] == [int(np.argmax(plan["scores"]["layers"]))]
    assert plan["after"]["kv_bytes"] * 2 == plan["before"]["kv_bytes"]
    cut = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert (cut.config.model_type, cut.config.num_hidden_layers) == ("llama", 1)
    ids = torch.arange(3, 9)[None]
    words_ = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(cut.generate(ids, **words_), cut.generate(ids, use_cache=False, **words_))


BAD_PLANS = {
    "no plan": ("[]", "no plan"),
    "another model's": ('{"kept": {"layers.9.mlp": [0]}}', "this model has no group layers.9.mlp"),
    "not there": ('{"kept": {"layers.0.mlp": [0, 99]}}', "need rising numbers from 0 to 47"),
    "nothing": ('{"kept": {"layers.0.mlp": []}}', "need rising numbers"),
    "everything": ('{"kept": {}}', "it keeps everything"),
    "fractions": ('{"kept": {"layers.0.mlp": [0, 1.9]}}', "need rising numbers"),
    "words": ('{"kept": {"layers.0.mlp": "01"}}', "need rising numbers"),
    "of another width": ('{"kept": {"layers.0.mlp": [0]}, "units": {"layers.0.mlp": 9}}', "has 9 units there, and 48"),
    "unlike layers": ('{"kept": {"layers.0.mlp": [0, 1]}}', "between 2 and 48 remain in different layers"),
}


@pytest.mark.parametrize("case", BAD_PLANS)
def test_a_plan_that_cannot_be_is_refused_in_one_line(case: str, made: Path, tmp_path: Path) -> None:
    text, said = BAD_PLANS[case]
    (tmp_path / "plan.json").write_text(text)
    config = composed(tmp_path, f"model.path={made / 'pretrain'}", f"stages.prune.plan={tmp_path / 'plan.json'}")
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": config, "stages": ["prune"]})
    assert "\n" not in str(refused.value)


def test_a_pruned_model_that_is_not_the_masked_model_leaves_nothing_behind(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layout that was misunderstood: the keys of one head with the queries of another."""

    def wrong(model: Any) -> Anatomy:
        anatomy = anatomy_of(model)
        for name, group in anatomy.groups.items():
            if group.kind == "heads":
                axes = tuple(
                    Axis(a.parameter, a.dim, a.places[::-1].copy(), a.silences) if "k_proj" in a.parameter else a
                    for a in group.axes
                )
                object.__setattr__(anatomy.groups[name], "axes", axes)
        return anatomy

    monkeypatch.setattr("pipeline.stages.prune.anatomy_of", wrong)
    with pytest.raises(Refusal, match=r"differ by .* nothing was written") as refused:
        make(tmp_path / "run", "prune", f"model.path={made / 'pretrain'}")
    assert "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["work"]  # nothing half-written either


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stages.prune.kept_fraction=1.2"], r"kept_fraction=1\.2: need \(0, 1\]"),
        (["stages.prune.kinds=[experts]"], "this model has no experts"),
        (["stages.prune.kinds=[layers]"], "Taylor scores heads, mlp, experts, hidden, and not layers"),
        (["stages.prune.calibration.length=1"], r"calibration\.length=1: need at least 2"),
        (["stages.prune.kinds=mlp"], r"kinds=mlp: need a list"),
        (["stages.prune.seed=-1"], "seed=-1: need a whole number"),
        (["stages.prune.plan=p.json", "stages.prune.scores=[x]"], "nothing is scored for a plan"),
        (["stages.prune.calibration.length=4096", "data.max_length=600"], "the model reads at most 512 tokens"),
        (["lora.targets=[]"], "need a list of modules' names"),
        (["stages.prune.steps=0"], "steps=0: need at least 1"),
        (["stages.prune.steps=2", "stages.prune.scores=[x]"], "they are of the whole model; use steps=1"),
        (["stages.prune.target_parameters=9"], "need one, the others null"),
        (["lora.targets=[w_proj]"], "the layers have no linear w_proj; they have q_proj"),
        (["lora.base=int3"], r"lora\.base=int3: need one of nf4"),
        (["lora=qlora", "strategy=zero3"], "packed weights are not sharded; use strategy=zero2"),
        (["lora.r=0"], r"lora\.r=0: need at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(tmp_path: Path, words: list[str], said: str) -> None:
    config = composed(tmp_path, *words)
    with pytest.raises(Refusal, match=said) as refused:
        check({"config": config, "stages": ["pretrain", "prune", "recover"]})
    assert "\n" not in str(refused.value)


def test_heads_that_no_config_can_express_stay_and_that_is_reported() -> None:
    gpt2 = config_of("gpt2")
    shapes = shapes_of(gpt2)
    scores = scores_of(shapes)
    kept, note = feasible(gpt2, shapes, scores, Wish(kept_fraction=0.75))
    assert note == "a gpt2 config cannot express 3 of 4 KV heads: 4 remain"
    assert set(kept) == {f"layers.{n}.mlp" for n in range(3)}
    with pytest.raises(Refusal, match="cannot express 3 of 4 KV heads, nor any other number but all; name other kinds"):
        feasible(gpt2, shapes, scores, Wish(kinds=("heads",), kept_fraction=0.75))


@pytest.mark.parametrize(
    ("words", "budget"),
    [
        ([], (0.8, None, None)),
        (["stages.prune.target_parameters=9K"], (None, 9_000, None)),
        (["stages.prune.target_bytes=18K"], (None, None, 18_000)),
        (["stages.prune.kept_fraction=0.5"], (0.5, None, None)),
    ],
)
def test_a_target_takes_the_place_of_the_default_fraction(
    tmp_path: Path, words: list[str], budget: tuple[Any, ...]
) -> None:
    plain = Experiment("prune_recover", ["model.path=model", "data.train=text.jsonl"])
    config = plain.composed(tmp_path, *words)
    wish = build(config, "prune")._wish(Context(config, "prune"))
    assert (wish.kept_fraction, wish.target_parameters, wish.target_bytes) == budget


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_the_adapter_beside_the_merged_model_gives_the_same_logits(made: Path) -> None:
    from peft import PeftModel

    told = manifest(made / "recover")["certificates"]["merged_equals_adapter"]
    assert 0 <= told["max_difference"] <= told["tolerance"]
    merged = AutoModelForCausalLM.from_pretrained(made / "recover").eval()
    base = AutoModelForCausalLM.from_pretrained(made / "prune").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        want, bare = merged(ids).logits, base(ids).logits
        got = PeftModel.from_pretrained(base, made / "recover" / "adapter").eval()(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (want - bare).abs().max() > 1e-3
    config = json.loads((made / "recover" / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["base_model_name_or_path"] == str(made / "prune")
    assert manifest(made / "recover")["parents"].keys() >= {"teacher", "student"}


def test_recovery_without_adapters_trains_all_weights(made: Path, tmp_path: Path) -> None:
    words = [f"model.path={made / 'pretrain'}", f"stages.recover.student.path={made / 'prune'}"]
    plain = Experiment("demo/prune_recover", [word for word in LITTLE if "lora" not in word])
    plain.make(tmp_path, "recover", *words, "stages.recover.lora=null")
    assert manifest(tmp_path / "recover")["certificates"] == {}
    assert not (tmp_path / "recover" / "adapter").exists()


def test_scores_of_two_texts_are_added_up_and_none_is_read(made: Path, tmp_path: Path) -> None:
    words = [f"model.path={made / 'pretrain'}", "stages.prune.calibration.samples=4"]
    one, other = (make(tmp_path / seed, "prune", *words, f"stages.prune.seed={seed}") for seed in ("1", "2"))
    given = f"stages.prune.scores=[{one},{other / 'scores.safetensors'}]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Taylor, "tally", None)
        both = make(tmp_path / "both", "prune", *words, given)
    parts = [load_file(folder / "scores.safetensors") for folder in (one, other)]
    total = load_file(both / "scores.safetensors")
    assert total["batches"] == 2
    for name, values in total.items():
        np.testing.assert_array_equal(values, parts[0][name] + parts[1][name])
    model = AutoModelForCausalLM.from_pretrained(made / "pretrain")
    scores = Taylor().scores(model, anatomy_of(model), ("heads", "mlp"), total)
    plan = json.loads((both / "plan.json").read_text())
    for name, values in scores.items():
        np.testing.assert_allclose(plan["scores"][name], values, rtol=1e-5)
    for odd, said in (
        ("stages.prune.kinds=[mlp]", "another kinds"),
        ("model.path=" + str(made / "recover"), "model"),
    ):
        with pytest.raises(Refusal, match=f"these are of another {said.split()[-1]}"):
            make(tmp_path / "odd", "prune", *words, given, odd)
    with pytest.raises(Refusal, match="no scores"):
        check({"config": composed(tmp_path, *words, f"stages.prune.scores=[{made}]"), "stages": ["prune"]})


def test_scoring_that_was_killed_goes_on_and_lands_on_the_same_bytes(made: Path, tmp_path: Path) -> None:
    words = [f"model.path={made / 'pretrain'}", "stages.prune.calibration.batch_size=2"]
    whole = make(tmp_path / "whole", "prune", *words)
    stage, context = begin(tmp_path / "killed", "prune", *words)
    stage.prepare(context)
    plain, read = Taylor.tally, []

    def dies_at_the_fourth(self: Any, *words: Any) -> Any:
        read.append(words)
        if len(read) == 4:
            raise KeyboardInterrupt
        return plain(self, *words)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Taylor, "tally", dies_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            stage.run(context)
        stage.run(context)
    assert len(read) == 4 + 2  # five batches, of which three were kept
    for name in ("model.safetensors", "plan.json", "scores.safetensors"):
        assert (context.out / name).read_bytes() == (whole / name).read_bytes()


def test_a_cut_in_steps_scores_what_the_steps_before_have_left(made: Path, tmp_path: Path) -> None:
    words = [f"model.path={made / 'pretrain'}", "stages.prune.kept_fraction=0.5"]
    steps: list[dict[str, np.ndarray]] = []
    plain = surgery.silence
    with pytest.MonkeyPatch.context() as patch:
        for place in ("pipeline.stages.prune", "models.pruning.proof"):
            patch.setattr(
                f"{place}.silence",
                lambda model, anatomy, kept: (steps.append(kept), plain(model, anatomy, kept)),
            )
        folder = make(tmp_path / "steps", "prune", *words, "stages.prune.steps=2")
    first, last = steps  # the second is the certificate's
    plan = json.loads((folder / "plan.json").read_text())
    once = json.loads((make(tmp_path / "once", "prune", *words) / "plan.json").read_text())
    for name, units in plan["kept"].items():
        assert set(units) == set(last[name]) < set(first[name])
        assert len(units) == len(once["kept"][name])
        removed = np.setdiff1d(np.arange(plan["units"][name]), first[name])
        assert (np.array(plan["scores"][name])[removed] == -1).all()
    # What was scored in the end is the model that the first step leaves.
    model = AutoModelForCausalLM.from_pretrained(made / "pretrain")
    anatomy = anatomy_of(model)
    config, _ = surgery.smaller_config(model.config, anatomy, first)
    cut = AutoModelForCausalLM.from_config(config)
    cut.load_state_dict(surgery.pruned_state(model.state_dict(), anatomy, first))
    stage, context = begin(tmp_path / "again", "prune", *words)
    stage.prepare(context)
    batches = CalibrationText(context, stage._tokenizer(), stage.seed).batches("train", stage.calibration)
    kinds = ("heads", "mlp")
    want = Taylor().scores(cut, anatomy_of(cut), kinds, gather(Taylor(), cut, anatomy_of(cut), kinds, batches))
    for name, values in want.items():
        np.testing.assert_allclose(np.array(plan["scores"][name])[first[name]], values, rtol=1e-4)


def test_a_plan_that_the_stage_would_write_over_is_refused(made: Path) -> None:
    plan = made / "prune" / "plan.json"
    config = composed(made, f"model.path={made / 'pretrain'}", f"stages.prune.plan={plan}")
    with pytest.raises(Refusal, match="the stage writes that file itself; copy it elsewhere first"):
        check({"config": config, "stages": ["prune"]})


def test_a_plan_says_where_its_widths_run() -> None:
    """vLLM divides heads and MLP evenly and copies KV heads; llama.cpp's blocks are of 32 and 256."""
    assert files._parallel(24, 6, 11039) == "1"
    assert files._parallel(24, 6, 11008) == "1, 2"
    assert files._parallel(24, 2, 11008) == "1, 2, 4, 8"
    assert files._parallel(32, 8, 14336) == "1, 2, 4, 8, 16, 32"
    said = files._blocks_of(4096, {"mlp": 11040, "heads": 3072})
    assert said == "K-quants do not fit rows of mlp 11040; Q4_0 and Q8_0 fit all rows"


@pytest.mark.slow
@pytest.mark.parametrize("model", ["its own", "stories260K"])
def test_most_of_the_perplexity_that_pruning_costs_is_won_back(model: str, tmp_path: Path) -> None:
    """The experiment as it stands in the README, and on a pretrained model."""
    words = []
    if model != "its own":
        words = [
            "start=prune", f"model.path={needed(STORIES)}", "data=files",
            f"data.train={needed(STORIES_TEXT)}", "data.max_documents=4000",
        ]  # fmt: skip
    done = train("+experiment=demo/prune_recover", *words, f"run_dir={tmp_path / 'run'}", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["stage"]: row for row in json.loads((tmp_path / "run" / "report.json").read_text())["rows"]}
    dense = rows["pretrain" if model == "its own" else "teacher"]["perplexity"]
    pruned, recovered = rows["prune"]["perplexity"], rows["recover"]["perplexity"]
    assert dense < recovered < pruned
    assert (pruned - recovered) / (pruned - dense) >= 0.7


class Striped:
    """A strategy of one's own, with no field that the built-in ones have."""

    several_ranks = sharded = shards_parameters = offloads_parameters = True


def test_a_strategy_of_ones_own_says_whether_the_model_that_is_scored_is_sharded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = composed(tmp_path, "trainer.devices=2")
    config["strategy"] = {"_target_": f"{__name__}.Striped"}
    opened: list[dict[str, Any]] = []
    monkeypatch.setattr("pipeline.stages.prune.load_sharded", lambda model, settings, **words: opened.append(settings))
    monkeypatch.setattr("pipeline.stages.prune.engine_of", lambda model, settings: Engine())
    build(config, "prune")._open(Context(config, "prune"), torch.device("cpu"))
    assert opened[0]["zero_optimization"]["offload_param"]["device"] == "cpu"


class Engine:
    def destroy(self) -> None:
        """It holds nothing."""


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "zero3"])
def test_two_ranks_score_as_one_does(made: Path, tmp_path: Path, strategy: str) -> None:
    words = [
        f"model.path={made / 'pretrain'}",
        "stages.prune.calibration.batch_size=7",
        "stages.prune.calibration.samples=8",
    ]
    one = load_file(make(tmp_path / "one", "prune", *words) / "scores.safetensors")
    done = train(
        "+experiment=demo/prune_recover", *LITTLE, *words, f"run_dir={tmp_path / 'two'}", "stages=[prune]",
        "trainer.devices=2", f"strategy={strategy}",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    two = load_file(tmp_path / "two" / "prune" / "scores.safetensors")
    assert two.keys() == one.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-6, atol=1e-6 * values.max(), err_msg=name)
    kept = [json.loads((tmp_path / n / "prune" / "plan.json").read_text())["kept"] for n in ("one", "two")]
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_two_ranks_recover_what_one_does(made: Path, tmp_path: Path, strategy: str) -> None:
    done = train(
        "+experiment=demo/prune_recover",
        *LITTLE,
        f"model.path={made / 'pretrain'}",
        f"stages.recover.student.path={made / 'prune'}",
        f"run_dir={tmp_path / 'two'}",
        "stages=[recover]",
        "stages.recover.training.micro_batch=4",
        "trainer.devices=2",
        f"strategy={strategy}",
        "trainer.checkpoint.every_steps=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    start = weights(made / "prune")
    for name, tensor in weights(made / "recover").items():
        torch.testing.assert_close(weights(tmp_path / "two" / "recover")[name], tensor, rtol=0, atol=1e-5, msg=name)
    moved = max(float((weights(made / "recover")[name] - tensor).abs().max()) for name, tensor in start.items())
    assert moved > 1e-3


@pytest.fixture(scope="module")
def packed(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "run"
    shutil.copytree(made / "prune", folder / "prune")
    return make(folder, "recover", f"model.path={made / 'pretrain'}", "lora=qlora")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks for it
def test_qlora_is_merged_into_what_its_bits_say(packed: Path, made: Path) -> None:
    """Against bitsandbytes' own modules, with PEFT's own layers on them, opened from the adapter that was written."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from peft import PeftModel

    told = manifest(packed)["certificates"]["merged_equals_adapter"]
    assert 0 <= told["max_difference"] <= told["tolerance"]
    merged = AutoModelForCausalLM.from_pretrained(packed).eval()
    base = AutoModelForCausalLM.from_pretrained(made / "prune").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        plain = base(ids).logits
        for name, module in list(base.model.layers.named_modules()):
            if isinstance(module, torch.nn.Linear):
                four = Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
                four.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
                parent = base.model.layers.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], four.to("cpu"))
                four.support_avx512bf16_for_cpu = False  # its kernel for these CPUs takes not all widths
        rounded = base(ids).logits
        adapted = PeftModel.from_pretrained(base, packed / "adapter").eval()(ids).logits
        got = merged(ids).logits
    assert (rounded - plain).abs().max() > 1e-2  # four bits are heard
    assert (adapted - rounded).abs().max() > 1e-3
    torch.testing.assert_close(got, adapted, rtol=1e-4, atol=1e-4)


def test_qlora_that_was_interrupted_ends_where_the_other_does(
    packed: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoints hold the adapters alone."""
    shutil.copytree(made / "prune", tmp_path / "run" / "prune")
    words = [
        f"model.path={made / 'pretrain'}", "lora=qlora", "trainer.checkpoint.every_steps=2",
    ]  # fmt: skip
    stage, context = begin(tmp_path / "run", "recover", *words)
    stage.prepare(context)
    plain = LanguageModel.on_train_batch_start

    def dies(self: Any, *words: Any) -> Any:
        if self.trainer.global_step == 4:
            raise InterruptedError
        return plain(self, *words)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModel, "on_train_batch_start", dies)
        with pytest.raises(InterruptedError):
            stage.run(context)
    newest = checkpoints(context.work / "checkpoints")[-1]
    names = load_file(newest / "rank-00000.safetensors")
    assert names
    assert all("lora_" in name for name in names)
    stage.prepare(context)  # as every start of a stage
    stage.run(context)
    one, other = weights(packed), weights(context.out)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
