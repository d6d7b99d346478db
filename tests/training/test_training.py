"""The one training step: nothing but the data and the seed decides what is learnt."""

from __future__ import annotations

import itertools
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from models.apart import check_apart
from models.errors import NotFinite, Refusal
from models.heads import check_split, hidden_states
from models.sharding import gathered_weights
from models.training import checkpoint
from models.training.saved import checkpoints, damage, read_head
from pipeline.context import Context
from pipeline.data.batch import collate
from pipeline.data.loader import Order, PackedSequences, accumulation, in_turn
from pipeline.training.fit import _tell_not_read
from tests import fitting
from tests.fitting import LENGTH, VOCABULARY, Scenario, fit, on_ranks, on_two_ranks, rows, said_of_torn, write_models

TOLERANCE = 1e-6  # fp32, 20 steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fits")
    write_models(made)
    fitting.write_damaged(made)
    return made


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """One process, the whole batch at once."""
    return fit(Scenario("reference"), folder)


# Under ZeRO-3 small parameters stay whole on every rank: some, with DeepSpeed's own threshold or another one, or all.
PERSISTENT = {
    name: Scenario(**{"name": f"zero3-{name}", "strategy": "zero3", "checkpoint_at": 7, **words})
    for name, words in {
        "wide": {"student": "wide", "persistence": None, "micro_batch": 4},
        "some": {"persistence": 300, "micro_batch": 2, "dropout": 0.1},
        "all": {"persistence": None, "micro_batch": 2},
        "offloaded": {"persistence": 300, "micro_batch": 4, "strategy": "zero3_offload"},
        "wide-bf16": {"student": "wide", "persistence": None, "micro_batch": 4, "precision": "bf16-mixed"},
    }.items()
}

TWO_RANKS = [
    Scenario("ddp", "ddp", micro_batch=4),
    Scenario("ddp-accumulated", "ddp", micro_batch=1),
    # Before those under ZeRO-3, whose configuration may outlive them in one process.
    Scenario("ddp-sharded", "ddp", micro_batch=4, sharded=True),
    Scenario("ddp-layers", "ddp", micro_batch=4, layers=True),
    Scenario("zero1", "zero1", micro_batch=4),
    Scenario("zero1-accumulated", "zero1", micro_batch=1),
    Scenario("zero1-bf16", "zero1", micro_batch=4, precision="bf16-mixed", checkpoint_at=7),
    Scenario("zero2-sharded", "zero2", micro_batch=2, sharded=True, offload="cpu"),
    Scenario("zero2", "zero2", micro_batch=2, in_parts=True),
    Scenario("zero2-bf16-sums", "zero2", micro_batch=4, communicated="bf16"),
    Scenario("zero2-left", "zero2", micro_batch=2, checkpoint_at=7),
    Scenario("zero3", "zero3", micro_batch=2),
    Scenario("zero3_offload", "zero3_offload", micro_batch=4),
    Scenario("zero3-tied", "zero3", micro_batch=4, tied=True, activation_checkpointing=True, in_parts=True),
    Scenario("zero3-saving", "zero3", micro_batch=2, checkpoint_at=7, dropout=0.1),
    Scenario("zero3-bf16", "zero3", micro_batch=4, precision="bf16-mixed"),
    Scenario("zero3-sharded", "zero3", micro_batch=4, sharded=True, checkpoint_at=7),
    Scenario("zero3-layers", "zero3", micro_batch=2, layers=True, sharded=True, checkpoint_at=7),
    Scenario("zero3-lora_head", "zero3", micro_batch=4, lora_head=True),
    Scenario("zero3-left", "zero3", micro_batch=2, checkpoint_at=7),
    Scenario("zero3-copies", "zero3", micro_batch=2, copies=2),
    Scenario("zero3-copies-sharded", "zero3", micro_batch=4, copies=2, sharded=True),
    Scenario("zero3-damaged", "zero3", damaged=True),
    *PERSISTENT.values(),
    *(Scenario(f"{name}-summed", name, precision="bf16-mixed", summed=True) for name in ("zero1", "zero2", "zero3")),
]


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return on_two_ranks(TWO_RANKS, folder)


def operations(metrics: list[dict[str, float]]) -> list[float]:
    """Of all ranks in each step but the first, as the rates say."""
    ranks = sum(name.startswith("memory_gb/rank_") for name in metrics[0])
    return [
        ranks * step["tflops_per_rank"] * (step["tokens"] - before["tokens"]) / step["tokens_per_second"]
        for before, step in itertools.pairwise(metrics)
    ]


def assert_same(
    one: dict[str, Any], other: dict[str, Any], tolerance: float = TOLERANCE, first: int = 0, costs: bool = True
) -> None:
    """`costs`: also what it took, which padded vocabularies add to."""
    for mine, theirs in zip(one["metrics"][first:], other["metrics"], strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["tokens"] == theirs["tokens"]
        for name in ("loss", "cross_entropy", "forward_kl", "grad_norm", "learning_rate"):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (mine["step"], name)
        if "teacher_gap" in mine:  # not of a horizon that is long
            assert mine["teacher_gap"] == pytest.approx(theirs["teacher_gap"], rel=tolerance, abs=tolerance)
            assert mine["top1_agreement"] == pytest.approx(theirs["top1_agreement"], abs=0.02)  # ties may fall
    if costs:
        assert operations(one["metrics"][first:]) == pytest.approx(operations(other["metrics"]), rel=1e-5)
    assert one["state"].keys() == other["state"].keys()
    for name, tensor in one["state"].items():
        torch.testing.assert_close(tensor, other["state"][name], rtol=0, atol=tolerance, msg=name)
    assert one["validation"]["validation_loss"] == pytest.approx(other["validation"]["validation_loss"], abs=tolerance)


@pytest.mark.parametrize("micro_batch", [4, 2, 1])
def test_accumulating_micro_batches_changes_neither_loss_nor_gradients(
    folder: Path, reference: Any, micro_batch: int
) -> None:
    assert_same(fit(Scenario("micro", micro_batch=micro_batch), folder), reference)


def test_padding_on_the_left_changes_nothing(folder: Path, reference: Any) -> None:
    assert_same(fit(Scenario("left", side="left"), folder), reference)


@pytest.mark.parametrize(
    "name",
    ["ddp", "ddp-accumulated", "zero1", "zero1-accumulated", "zero2", "zero3", "zero3_offload"]
    + ["ddp-sharded", "zero2-sharded", "zero3-sharded"],
)
def test_two_ranks_learn_what_one_does(two_ranks: Any, reference: Any, name: str) -> None:
    assert_same(two_ranks[name], reference)


def test_under_zero3_every_rank_refuses_a_damaged_model_by_the_tensors_name(two_ranks: Any, folder: Path) -> None:
    name = fitting.DAMAGED
    for harm, what in {
        "missing": f"1 tensor missing from its weights: {name}",
        "unexpected": f"1 tensor in its weights and not in the model of its config: {name}.more",
        "shape": f"1 tensor of another shape: {name} [32, 63] where the config says [32, 64]",
        "nan": f"NaN in {name}",
    }.items():
        one, other = two_ranks["zero3-damaged"][harm]
        assert one == other
        assert one.startswith(f"model.path={folder / harm}: {what}")


def test_weights_held_a_second_time_for_the_backward_pass_learn_the_same(reference: Any, two_ranks: Any) -> None:
    assert_same(two_ranks["zero3-copies"], reference)
    assert_same(two_ranks["zero3-copies-sharded"], reference)
    assert two_ranks["zero3-copies"]["copied"]
    assert not two_ranks["zero3"]["copied"]


@pytest.mark.slow
def test_each_of_two_nodes_holds_the_weights_a_second_time(folder: Path, reference: Any) -> None:
    scenario = Scenario("four-copies", "zero3", micro_batch=2, copies=2)
    found = on_ranks(4, [scenario], folder)["four-copies"]
    assert_same(found, reference)
    assert found["copied"]


@pytest.mark.slow
def test_what_is_offloaded_to_files_learns_and_goes_on_as_in_memory(folder: Path) -> None:
    """Optimizer states, masters and gradients of the student, and the weights of a teacher with its own engine."""
    builder = pytest.importorskip("deepspeed.ops.op_builder").AsyncIOBuilder()
    if not builder.is_compatible(verbose=False):
        pytest.skip("needs libaio")
    builder.load()  # compiled once, not by two ranks at a time
    fitting.saved(folder, "large", fitting.model(512, 2, seed=1))
    fitting.saved(folder, "large-teacher", fitting.model(512, 3, seed=2))
    (folder / "disk").mkdir()
    # What has less than 1 MB stays in memory.
    plain = Scenario(
        "", "zero3_offload", micro_batch=4, steps=8, student="large", teacher="large-teacher", sub_group=600_000
    )
    again = {"resume": True, "resume_from": "nvme"}
    # Masters of another dtype than the weights, several micro-batches to a step, small parameters whole.
    bf16 = {"precision": "bf16-mixed", "micro_batch": 2, "persistence": 300}
    scenarios = {
        "memory": {"checkpoint_at": 4},
        "nvme": {"nvme": True, "checkpoint_at": 4},
        "nvme-again": {"nvme": True, **again},
        "memory-again": again,
        "nvme-of-memory": {"nvme": True, "resume": True, "resume_from": "memory"},
        "teacher": {"nvme": True, "sharded": True, "offload": "nvme"},
        "memory-bf16": bf16,
        "nvme-bf16": {**bf16, "nvme": True, "checkpoint_at": 4},
        "nvme-bf16-again": {**bf16, "nvme": True, "resume": True, "resume_from": "nvme-bf16"},
    }
    found = on_two_ranks([replace(plain, name=name, **words) for name, words in scenarios.items()], folder)
    size = sum(tensor.numel() for tensor in found["memory"]["state"].values())
    on_disk = {name: result["on_disk"] for name, result in found.items()}  # of all so far
    added = {
        name: on_disk[name]["optimizer"] - on_disk[before]["optimizer"] for before, name in itertools.pairwise(on_disk)
    }
    assert not any(on_disk["memory"].values())
    for name in ("nvme", "nvme-again", "nvme-of-memory", "nvme-bf16", "nvme-bf16-again"):
        assert added[name] > 0.9 * 4 * 3 * size, name
    assert on_disk["teacher"]["params"] > 0.5 * 4 * size
    for name, plain_one in {"nvme": "memory", "teacher": "memory", "nvme-bf16": "memory-bf16"}.items():
        assert_same(found[name], found[plain_one], tolerance=0)
    for name in ("nvme-again", "memory-again", "nvme-of-memory"):
        assert len(found[name]["metrics"]) == 4
        assert_same(found["memory"], found[name], tolerance=0, first=4)
    assert_same(found["memory-bf16"], found["nvme-bf16-again"], tolerance=0, first=4)
    assert not list((folder / "disk").iterdir())  # nothing is left


def test_gradients_summed_in_bf16_are_rounded(reference: Any, two_ranks: Any) -> None:
    norms = [step["grad_norm"] for step in two_ranks["zero2-bf16-sums"]["metrics"]]
    exact = [step["grad_norm"] for step in reference["metrics"]]
    assert norms == pytest.approx(exact, rel=2e-2)
    assert norms[0] != pytest.approx(exact[0], rel=1e-5)


def test_weights_are_gathered_in_the_dtype_that_is_saved() -> None:
    model = fitting.model(16, 1, seed=1, tied=True)
    model.register_buffer("steps", torch.tensor([3]))
    state = dict(gathered_weights(model, keep=True, dtype=torch.bfloat16))
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        name: tensor.dtype if name == "steps" else torch.bfloat16 for name, tensor in model.state_dict().items()
    }
    assert state["lm_head.weight"] is state["model.embed_tokens.weight"]
    assert torch.equal(state["model.norm.weight"], model.model.norm.weight.to(torch.bfloat16))
    kept = dict(gathered_weights(model, keep=True))
    assert kept["model.norm.weight"].data_ptr() != model.model.norm.weight.data_ptr()  # a copy
    assert not list(gathered_weights(model, keep=False))


def test_tied_embeddings_with_activation_checkpointing_under_zero3_learn_the_same(folder: Path, two_ranks: Any) -> None:
    assert_same(two_ranks["zero3-tied"], fit(Scenario("tied", tied=True), folder))


@pytest.mark.parametrize("name", ["zero2", "zero3-tied"])
def test_what_two_ranks_save_while_they_gather_it_is_what_they_trained(folder: Path, two_ranks: Any, name: str) -> None:
    saved = {
        key: value
        for path in (folder / f"{name}-saved").glob("*.safetensors")
        for key, value in load_file(path).items()
    }
    state = two_ranks[name]["state"]
    assert len([*(folder / f"{name}-saved").glob("*.safetensors")]) >= 2
    assert saved.keys() == state.keys() - ({"lm_head.weight"} if name == "zero3-tied" else set())
    assert all(torch.equal(value, state[key].bfloat16()) for key, value in saved.items())


def test_a_sharded_teacher_in_one_process_is_the_online_one(folder: Path, reference: Any) -> None:
    scenarios = [Scenario(f"alone-{offload}", sharded=True, offload=offload) for offload in ("none", "cpu")]
    for result in on_ranks(1, scenarios, folder).values():
        assert_same(result, reference)


def test_a_step_says_how_near_the_student_is_and_what_it_cost(
    folder: Path, reference: Any, two_ranks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, of which nobody knows the peak, without MFU."""
    last = reference["metrics"][-1]
    assert {"teacher_gap", "top1_agreement", "tflops_per_rank", "grad_norm", "tokens_per_second"} <= last.keys()
    assert 0 <= last["top1_agreement"] <= 1
    assert "mfu" not in last
    assert 0.05 < last["memory_gb/rank_0"] < 100
    assert {"memory_gb/rank_0", "memory_gb/rank_1"} <= two_ranks["ddp"]["metrics"][-1].keys()
    assert min(two_ranks["ddp"]["metrics"][-1][f"memory_gb/rank_{rank}"] for rank in (0, 1)) > 0.05
    monkeypatch.setattr("models.training.language_model.peak_of", lambda *_: 2e12)
    step = fit(Scenario("known", steps=2), folder)["metrics"][-1]
    assert step["mfu"] == pytest.approx(step["tflops_per_rank"] / 2)


@pytest.fixture(scope="module")
def layers(folder: Path) -> dict[str, Any]:
    return fit(Scenario("layers", layers=True), folder)


@pytest.mark.parametrize("name", ["ddp-layers", "zero3-layers"])
def test_two_ranks_learn_from_layers_what_one_does(two_ranks: Any, layers: Any, name: str) -> None:
    assert_same(two_ranks[name], layers)
    for one, other in zip(two_ranks[name]["metrics"], layers["metrics"], strict=True):
        for term in ("hidden_states", "attention_relations"):
            assert one[term] == pytest.approx(other[term], rel=1e-4)


def test_comparing_layers_changes_what_is_learnt_and_falls(layers: Any, reference: Any) -> None:
    first, last = layers["metrics"][0], layers["metrics"][-1]
    assert last["hidden_states"] < 0.97 * first["hidden_states"]
    assert not torch.equal(*(each["state"]["model.embed_tokens.weight"] for each in (layers, reference)))


def test_the_loss_that_is_reported_is_the_weighted_sum_of_its_terms(layers: Any) -> None:
    for step in layers["metrics"]:
        terms = 0.3 * step["cross_entropy"] + 0.7 * step["forward_kl"] + step["hidden_states"]
        assert step["loss"] == pytest.approx(terms + step["attention_relations"], rel=1e-5)


def test_layers_with_their_projections_resume_to_the_bit(folder: Path, two_ranks: Any) -> None:
    scenario = Scenario("zero3-layers", "zero3", micro_batch=2, layers=True, sharded=True, resume=True)
    assert_same(two_ranks["zero3-layers"], on_two_ranks([scenario], folder)["zero3-layers"], tolerance=0, first=7)


def test_a_low_rank_adapter_on_the_head_learns_the_same_under_zero3(folder: Path, two_ranks: Any) -> None:
    alone = fit(Scenario("lora", lora_head=True), folder)
    assert_same(two_ranks["zero3-lora_head"], alone)
    start = AutoModelForCausalLM.from_pretrained(folder / "student-False-0.0").state_dict()
    assert torch.equal(alone["state"]["lm_head.base_layer.weight"], start["lm_head.weight"])


@pytest.mark.parametrize("name", ["zero3-sharded", "zero3-layers", "zero3-saving"])
def test_a_checkpoint_holds_what_is_trained_and_no_teacher(folder: Path, two_ranks: Any, name: str) -> None:
    (checkpoint,) = checkpoints(folder / "saved" / name)
    files = [load_file(path) for path in sorted(checkpoint.glob("*.safetensors"))]
    assert len(files) == 2
    sizes: dict[str, int] = {}
    for key, tensor in (entry for file in files for entry in file.items()):
        if key.endswith("|value"):
            sizes[key.split("|")[0]] = sizes.get(key.split("|")[0], 0) + tensor.numel()
    student = {f"student.{key}": tensor.numel() for key, tensor in two_ranks[name]["state"].items()}
    assert {key: size for key, size in sizes.items() if not key.startswith("comparisons.")} == student
    assert damage(checkpoint) is None


@pytest.mark.parametrize("name", ["zero1-bf16", "zero3-bf16"])
def test_bf16_over_fp32_masters_stays_close(two_ranks: Any, reference: Any, name: str) -> None:
    # bf16 keeps 8 bits: about 0.4 % of a weight; the largest weights here are near 1
    for weight, tensor in two_ranks[name]["state"].items():
        torch.testing.assert_close(tensor.float(), reference["state"][weight], rtol=0, atol=1e-2, msg=weight)
    assert two_ranks[name]["metrics"][-1]["loss"] == pytest.approx(reference["metrics"][-1]["loss"], abs=5e-3)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
def test_gradients_of_a_bf16_model_are_added_up_in_fp32(two_ranks: Any, name: str) -> None:
    """Truth: 1 + 255 · 2⁻⁹. In bf16 each of the 255 is lost, 1 being the nearest number."""
    assert torch.equal(two_ranks[f"{name}-summed"]["sum"], torch.full((1, 8), 1.498046875))


def test_the_teacher_is_sharded_under_zero3_and_never_gets_a_gradient(two_ranks: Any) -> None:
    assert two_ranks["zero3"]["teacher_sharded"]
    assert not two_ranks["zero2"]["teacher_sharded"]
    trained = [two_ranks[each.name] for each in TWO_RANKS if not (each.summed or each.damaged)]
    assert all(result["teacher_gradients"] == [] for result in trained)


def test_a_zero3_run_resumed_with_dropout_lands_on_the_same_weights(folder: Path, two_ranks: Any) -> None:
    resumed = on_two_ranks([Scenario("zero3-saving", "zero3", micro_batch=2, resume=True, dropout=0.1)], folder)
    assert_same(two_ranks["zero3-saving"], resumed["zero3-saving"], tolerance=0, first=7)


def _kept_by_safetensors() -> list[torch.dtype]:
    """Every dtype that its own writer takes, but for those of which two share a byte."""
    found = []
    for dtype in sorted({each for each in vars(torch).values() if isinstance(each, torch.dtype)}, key=str):
        try:
            save({"x": torch.zeros(16, dtype=torch.uint8).view(dtype)})
        except (KeyError, ValueError, RuntimeError):
            continue
        found += [] if "float4" in str(dtype) else [dtype]
    return found


@pytest.mark.parametrize("dtype", _kept_by_safetensors(), ids=str)
def test_a_tensor_of_every_dtype_goes_into_a_checkpoint_and_comes_back(tmp_path: Path, dtype: torch.dtype) -> None:
    bits = torch.arange(96, dtype=torch.uint8)
    values = bits.bool() if dtype == torch.bool else bits.view(dtype)
    tensors = {"weight|0|value": values[:4], "weight|4|value": values[4:], "weight|step": values[2], "|kept": values}
    mine = checkpoint.Share(0, 1, tensors, {"step": 1})
    checkpoint.write(mine, tmp_path / "aside")
    checkpoint.finish(mine, tmp_path / "aside", tmp_path / "step-1", threading.Event())
    assert damage(tmp_path / "step-1") is None
    with safe_open(tmp_path / "step-1" / "rank-00000.safetensors", "pt") as theirs:
        assert theirs.get_tensor("|kept").dtype == dtype
    with checkpoint._Reader(tmp_path / "step-1", read_head(tmp_path / "step-1")) as saved:
        for back, truth in (
            (saved.stretch("weight", "value", 2, len(values) - 3), values[2:-1]),
            (saved.numbers("weight")["step"], values[2]),
            (saved.others()["kept"], values),
        ):
            assert (back.dtype, back.shape) == (dtype, truth.shape)
            assert torch.equal(*(each.contiguous().view(-1).view(torch.uint8) for each in (back, truth)))


def test_a_tensor_that_safetensors_does_not_hold_is_refused_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"^a tensor of torch\.complex128 cannot be written: safetensors has F64, "):
        checkpoint.write(checkpoint.Share(0, 1, {"x|0|value": torch.zeros(2, dtype=torch.complex128)}, {}), tmp_path)


def test_a_single_process_resumes_to_the_bit(folder: Path) -> None:
    whole = fit(Scenario("saving", micro_batch=4, checkpoint_at=7, dropout=0.1), folder)
    resumed = fit(Scenario("saving", micro_batch=4, resume=True, dropout=0.1), folder)
    assert_same(whole, resumed, tolerance=0, first=7)


@pytest.fixture(scope="module")
def wide(folder: Path) -> dict[str, Any]:
    return fit(Scenario("wide-reference", student="wide"), folder)


@pytest.mark.parametrize("name", PERSISTENT)
def test_with_parameters_that_stay_whole_under_zero3_a_run_resumes_to_the_bit(
    two_ranks: Any, taken_up: Any, name: str
) -> None:
    whole, names = two_ranks[f"zero3-{name}"], set(two_ranks[f"zero3-{name}"]["state"])
    assert_same(whole, taken_up[f"zero3-{name}"], tolerance=0, first=7)
    assert whole["persistent"] == names if name == "all" else set() < whole["persistent"] < names


@pytest.mark.parametrize("name", ["wide", "all", "offloaded"])
def test_parameters_that_stay_whole_under_zero3_learn_and_are_taken_up_by_one_process(
    folder: Path, two_ranks: Any, reference: Any, wide: Any, name: str
) -> None:
    truth = wide if name == "wide" else reference
    left = PERSISTENT[name]
    assert_same(truth, two_ranks[left.name])
    alone = Scenario(f"{name}-single", student=left.student, resume=True, resume_from=left.name)
    assert_same(truth, fit(alone, folder), first=7)


# under which strategy a run is left at step 7, and under which it is taken up again, on two ranks but for "single"
TAKEN_UP = {
    "single-zero2": Scenario("single-zero2", "zero2", micro_batch=4, resume=True, resume_from="single-left"),
    "single-ddp": Scenario("single-ddp", "ddp", micro_batch=2, resume=True, resume_from="single-left"),
    "zero3-ddp": Scenario("zero3-ddp", "ddp", micro_batch=4, resume=True, resume_from="zero3-left"),
    "zero3-zero1": Scenario("zero3-zero1", "zero1", micro_batch=4, resume=True, resume_from="zero3-left"),
    "zero2-some": Scenario(
        "zero2-some", "zero3", micro_batch=4, persistence=300, resume=True, resume_from="zero2-left"
    ),
    "all-zero3": Scenario("all-zero3", "zero3", micro_batch=4, resume=True, resume_from="zero3-all"),
    "zero2-copies": Scenario("zero2-copies", "zero3", micro_batch=4, copies=2, resume=True, resume_from="zero2-left"),
    "zero2-zero3": Scenario("zero2-zero3", "zero3", micro_batch=4, resume=True, resume_from="zero2-left"),
}


@pytest.fixture(scope="module")
def taken_up(folder: Path, two_ranks: Any) -> dict[str, dict[str, Any]]:
    fit(Scenario("single-left", micro_batch=4, checkpoint_at=7), folder)
    same = [replace(scenario, resume=True) for scenario in PERSISTENT.values()]
    return on_two_ranks([*TAKEN_UP.values(), BF16_TAKEN_UP, *same], folder)


BF16_TAKEN_UP = Scenario(
    "zero1-bf16-zero3", "zero3", micro_batch=4, precision="bf16-mixed", resume=True, resume_from="zero1-bf16"
)


@pytest.mark.parametrize("name", TAKEN_UP)
def test_a_run_is_taken_up_by_another_strategy(taken_up: Any, reference: Any, name: str) -> None:
    """No sample is skipped or repeated: every loss is that of an uninterrupted run of one process."""
    assert_same(reference, taken_up[name], first=7)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_ranks_are_taken_up_by_one_process(folder: Path, two_ranks: Any, reference: Any, name: str) -> None:
    alone = fit(Scenario(f"{name}-single", micro_batch=8, resume=True, resume_from=f"{name}-left"), folder)
    assert_same(reference, alone, first=7)


def test_in_bf16_the_masters_are_taken_up(taken_up: Any, two_ranks: Any) -> None:
    whole, other = two_ranks["zero1-bf16"], taken_up["zero1-bf16-zero3"]
    for mine, theirs in zip(whole["metrics"][7:], other["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-3)  # bf16 keeps 8 bits
    first = whole["metrics"][7], other["metrics"][0]  # of the same weights
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-5)


@pytest.mark.slow
def test_two_ranks_are_taken_up_by_four(folder: Path, two_ranks: Any, reference: Any) -> None:
    four = on_ranks(
        4,
        [Scenario(f"{k}-four", k, micro_batch=2, resume=True, resume_from=f"{k}-left") for k in ("zero2", "zero3")],
        folder,
    )
    for result in four.values():
        assert_same(reference, result, first=7)


def test_a_padded_vocabulary_teaches_the_same(folder: Path, reference: Any) -> None:
    """More columns than the tokenizer has tokens, on either side: as if they were not there."""
    for name, source in (("teacher-padded", "teacher"), ("student-padded", "student-False-0.0")):
        model = AutoModelForCausalLM.from_pretrained(folder / source)
        torch.manual_seed(5)
        model.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
        model.lm_head.weight.data[VOCABULARY:] += 3  # loud, if anybody listened
        model.save_pretrained(folder / name)
    assert_same(fit(Scenario("padded", teacher="teacher-padded"), folder), reference, costs=False)
    both = fit(Scenario("both", teacher="teacher-padded", student="student-padded"), folder)
    both["state"] = {n: t[:VOCABULARY] if len(t) == VOCABULARY + 7 else t for n, t in both["state"].items()}
    assert_same(both, reference, costs=False)


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_rows(folder: Path) -> None:
    with pytest.raises(NotFinite, match=r"step \d+: the loss is nan on sequences \[\d+.*a checkpoint"):
        fit(Scenario("poisoned", poisoned=True, micro_batch=1), folder)


def test_a_gradient_that_is_no_number_names_all_sequences_of_the_step_on_every_rank(folder: Path) -> None:
    """Over micro-batches and ranks; the truth is the order of the data, of which ranks know nothing. DeepSpeed calls
    every such norm infinite."""
    several = [Scenario(f"torn-{kind}", kind, micro_batch=1, torn=True) for kind in ("ddp", "zero2")]
    said = [said_of_torn(Scenario("torn", micro_batch=1, torn=True), folder)["said"]]
    said += [result["said"] for result in on_two_ranks(several, folder).values()]
    assert [len(each) for each in said] == [1, 2, 2]
    told = re.compile(r"step 0: the gradient's norm is (?:nan|inf) on sequences \[(.+)\] \(all of the step\)")
    for line in (line for each in said for line in each):
        found = told.match(line)
        assert found, line
        assert sorted(map(int, found[1].split(", "))) == sorted(first_step())


def test_an_offloaded_optimizer_is_not_given_parameters_without_a_gradient(folder: Path) -> None:
    """Without offloading their gradient is zero."""
    scenarios = [Scenario(name, name, micro_batch=2, steps=2, spare=True) for name in ("zero2", "zero3_offload")]
    plain, offloaded = (result["said"] for result in on_two_ranks(scenarios, folder).values())
    assert plain == ["nothing", "nothing"]
    assert [line.partition(",")[0] for line in offloaded] == [
        "step 0: there was no gradient of student.model.spare.bias and of 1 more"
    ] * 2


def test_a_run_resumed_with_other_micro_batches_learns_the_same(folder: Path) -> None:
    whole = fit(Scenario("regrouped", micro_batch=4, checkpoint_at=7), folder)
    assert_same(whole, fit(Scenario("regrouped", micro_batch=2, resume=True), folder), first=7)


def test_the_loss_is_the_dense_formula_over_the_whole_batch(folder: Path, reference: Any) -> None:
    batch = whole_batch()
    student = AutoModelForCausalLM.from_pretrained(folder / "student-False-0.0")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    kept = batch["targets"] >= 0
    with torch.no_grad():
        # with a KV cache transformers would not look at the positions, and packed documents would see each other
        logits, taught = (
            m(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[kept]
            for m in (student, teacher)
        )
    hard = F.cross_entropy(logits, batch["targets"][kept])
    soft = F.kl_div(
        F.log_softmax(logits / 2, -1), F.log_softmax(taught / 2, -1), log_target=True, reduction="batchmean"
    )
    first = reference["metrics"][0]
    assert first["cross_entropy"] == pytest.approx(hard.item(), rel=1e-6)
    assert first["forward_kl"] == pytest.approx(4 * soft.item(), rel=1e-5)
    assert first["loss"] == pytest.approx(0.3 * hard.item() + 0.7 * 4 * soft.item(), rel=1e-6)


def first_step() -> list[int]:
    data = rows()
    order = Order(_column(data, "supervised"), _lengths(data), seed=0, global_batch=8, micro_batch=8, rank=0, world=1)
    found: list[int] = order.step_sequences(0).tolist()
    return found


def whole_batch() -> dict[str, torch.Tensor]:
    data = rows()
    return collate([data[i] for i in first_step()], pad_token=0, length=LENGTH)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma2", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("attention", [None, "eager"])
def test_packed_documents_do_not_see_each_other(family: str, attention: str | None) -> None:
    from transformers import AutoConfig

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if family in ("mistral", "gemma2"):
        shape["sliding_window"] = 4  # shorter than a document, so that both kinds of mask are at work
    config = AutoConfig.for_model(family, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    documents = [torch.randint(1, VOCABULARY, (n,)) for n in (7, 1, 10)]
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    with torch.no_grad():
        together = hidden_states(model, packed, positions)[0]
        apart = torch.cat([hidden_states(model, d[None], torch.arange(len(d))[None])[0] for d in documents])
        plain = torch.cat([model(input_ids=d[None]).logits[0] for d in documents])
    # the plain attention takes its softmax in fp32 whatever the model's dtype
    tolerance = 1e-12 if model.config._attn_implementation == "sdpa" else 1e-5
    torch.testing.assert_close(together, apart, rtol=0, atol=tolerance)
    logits = model(input_ids=packed, position_ids=positions, use_cache=False).logits[0]
    torch.testing.assert_close(logits, plain, rtol=0, atol=tolerance)


def test_a_family_that_cannot_keep_packed_documents_apart_is_refused() -> None:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config).eval()
    check_split(model, VOCABULARY, packed=False)
    with pytest.raises(Refusal, match=r"OPTForCausalLM.*data\.packing=false"):
        check_split(model, VOCABULARY, packed=True)


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
GEMMA = {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64, "sliding_window": 8}
APART = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "gpt2": {},
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "qwen3": {"head_dim": 32, "intermediate_size": 64, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 64, "pad_token_id": 0},
    "gpt_neox": {"intermediate_size": 64},
}
TOGETHER = {
    "bloom": {},  # its attention looks at the distance in the row, and at no positions
    "lfm2": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_key_value_heads": 2, "pad_token_id": 0},
    "falcon_h1": {"intermediate_size": 64, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 4,
                  "mamba_d_head": 16, "mamba_d_state": 8},
    "mamba": {},
    "falcon": {"alibi": True},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 64},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", APART)
def test_of_fresh_weights_not_a_bit_of_a_document_depends_on_the_one_before(family: str, dtype: torch.dtype) -> None:
    config = AutoConfig.for_model(family, **SMALL, **APART[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    ids = torch.randint(1, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    ids[1, 17:] = ids[0, 17:]
    positions = torch.cat([torch.arange(17), torch.arange(23)]).repeat(2, 1)
    with torch.no_grad():
        one, other = (hidden_states(model, row[None], positions[:1])[:, 17:] for row in ids)
    assert torch.equal(one, other)
    check_split(model, VOCABULARY, packed=True)
    check_apart(config, "student")


@pytest.mark.parametrize("family", TOGETHER)
def test_families_whose_documents_see_each_other_are_refused_before_they_have_weights(family: str) -> None:
    config = AutoConfig.for_model(family, **SMALL, **TOGETHER[family])
    said = r"a document of a packed sequence sees the one before it; set data\.packing=false"
    with pytest.raises(Refusal, match=f"^student: .*{said}"):
        check_apart(config, "student")
    model = AutoModelForCausalLM.from_config(config).eval()
    check_split(model, VOCABULARY, packed=False)
    with pytest.raises(Refusal, match=said):
        check_split(model, VOCABULARY, packed=True)


@pytest.mark.parametrize(
    ("family", "values"),
    [
        (
            "granitemoehybrid",
            {
                **{"vocab_size": 100352, "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 40},
                **{"num_attention_heads": 12, "num_key_value_heads": 4, "num_local_experts": 64},
                **{"num_experts_per_tok": 6, "shared_intermediate_size": 1024, "mamba_n_heads": 48},
                **{"layer_types": (["mamba"] * 5 + ["attention"] + ["mamba"] * 4) * 4, "mamba_d_head": 64},
            },
        ),
        (
            "bamba",
            {
                **{"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
                **{"attn_layer_indices": [9, 18, 27], "mamba_n_heads": 128, "mamba_d_head": 64},
            },
        ),
    ],
)
def test_hybrids_of_published_sizes_are_asked_by_a_small_model(family: str, values: dict[str, Any]) -> None:
    with pytest.raises(Refusal, match=r"a document of a packed sequence sees the one before it"):
        check_apart(AutoConfig.for_model(family, **values), "student")


def test_numbers_that_are_not_finite_are_no_leak() -> None:
    """NaN differs from itself."""
    config = AutoConfig.for_model("llama", **SMALL, **APART["llama"], rms_norm_eps=float("nan"))
    said = r"LlamaForCausalLM: NaN or infinity in its last hidden state"
    with pytest.raises(Refusal, match=f"^student: {said}"):
        check_apart(config, "student")
    model = AutoModelForCausalLM.from_config(config).eval()
    for packed in (False, True):
        with pytest.raises(Refusal, match=said):
            check_split(model, VOCABULARY, packed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SMALL, **APART["llama"])).eval()
    torch.nn.init.constant_(model.lm_head.weight[3], float("inf"))
    with pytest.raises(Refusal, match="NaN or infinity in its logits"):
        check_split(model, VOCABULARY, packed=False)


def test_experts_whose_batches_differ_in_size_are_no_leak() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", **SMALL, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    check_apart(config, "student")
    for dtype in (torch.float32, torch.bfloat16):
        check_split(AutoModelForCausalLM.from_config(config, dtype=dtype).eval(), VOCABULARY, packed=True)


def test_packed_and_unpacked_rows_give_the_same_loss_and_gradients() -> None:
    from models.heads import head_of, through_head
    from models.objectives.chunked import objective_sum
    from models.objectives.cross_entropy import CrossEntropy

    model = fitting.model(16, 2, seed=1).double()
    packed = [rows(6)[i] for i in range(6)]
    pieces = []
    for row in packed:
        cut = row["position_ids"].index(0, 1)
        for part in (slice(0, cut), slice(cut, None)):
            pieces.append({name: row[name][part] for name in ("input_ids", "position_ids", "targets")})

    def loss_and_gradient(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        hidden = hidden_states(model, batch["input_ids"], batch["position_ids"])
        total, _ = through_head(
            model, hidden, lambda h: objective_sum(CrossEntropy(), h, head_of(model), batch["targets"])
        )
        total.backward()
        return total.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    together = loss_and_gradient(collate(packed, pad_token=0))
    apart = loss_and_gradient(collate(pieces, pad_token=0))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-11)


def _column(data: Any, name: str) -> Any:
    import numpy as np

    return np.asarray([row[name] for row in data])


def _lengths(data: Any) -> Any:
    import numpy as np

    return np.asarray([len(row["input_ids"]) for row in data])


def test_ranks_and_micro_batches_share_out_one_order() -> None:
    data = rows(11)

    def taken(world: int, micro: int, first: int = 0, steps: int = 5) -> list[list[int]]:
        """Rows per step, put together from all ranks."""
        per_rank = []
        for rank in range(world):
            order = iter(
                Order(
                    _column(data, "supervised"),
                    _lengths(data),
                    seed=3,
                    global_batch=4,
                    micro_batch=micro,
                    rank=rank,
                    world=world,
                    first_step=first,
                )
            )
            per_rank.append([[next(order) for _ in range(accumulation(4, micro, world))] for _ in range(steps)])
        return [
            [
                row
                for micro_at in range(len(per_rank[0][step]))
                for rank in range(world)
                for row in per_rank[rank][step][micro_at].sequences
            ]
            for step in range(steps)
        ]

    whole = taken(1, 4)
    assert whole == taken(1, 1) == taken(2, 2) == taken(2, 1) == taken(4, 1)
    assert whole[2:] == taken(2, 1, first=2, steps=3)
    flat = [row for step in whole for row in step]
    assert sorted(flat[:11]) == list(range(11))  # an epoch sees every row once before any row twice


def test_every_rank_knows_the_tokens_of_the_whole_step() -> None:
    data = rows(11)
    for rank in range(2):
        order = Order(
            _column(data, "supervised"), _lengths(data), seed=0, global_batch=4, micro_batch=1, rank=rank, world=2
        )
        micro = next(iter(order))
        assert micro.step_tokens == sum(data[int(i)]["supervised"] for i in order.step_sequences(0))


def test_a_skipped_sequence_is_blank_from_its_step_on_and_counts_for_nothing() -> None:
    data = rows(7)
    words: dict[str, Any] = {"seed": 3, "global_batch": 4, "micro_batch": 2, "world": 1, "rank": 0}
    supervised, lengths = _column(data, "supervised"), _lengths(data)
    plain = Order(supervised, lengths, **words)
    gone = int(plain.step_sequences(0)[1])
    later = next(step for step in range(1, 9) if gone in plain.step_sequences(step))
    skipping = Order(supervised, lengths, skipped={gone: 1}, **words)
    for step, mine, theirs in zip(np.arange(2 * (later + 1)) // 2, skipping, plain, strict=False):
        whole = gone in plain.step_sequences(step) and step >= 1
        assert mine.sequences == [-1 if number == gone and step >= 1 else number for number in theirs.sequences]
        assert mine.step_tokens == theirs.step_tokens - (supervised[gone] if whole else 0)
        assert mine.tokens_of_step == theirs.tokens_of_step - (lengths[gone] if whole else 0)


@pytest.mark.parametrize(("first", "end"), [(0, 1), (2, 5), (4, 6), (5, 5), (3, 40)])
def test_which_sequences_are_still_read_is_what_the_order_itself_goes_through(first: int, end: int) -> None:
    counts = np.ones(20, dtype=np.int64)
    order = Order(counts, counts, seed=3, global_batch=4, micro_batch=4, rank=0, world=1, first_step=first)
    read = {number for micro in itertools.islice(order, end - first) for number in micro.sequences}
    assert order.read_between(range(20), first, end) == read
    assert order.read_between([7, 9], first, end) == read & {7, 9}


def test_skipped_sequences_that_are_not_read_again_are_told_and_noted(capsys: pytest.CaptureFixture[str]) -> None:
    data = PackedSequences(rows(20), None, seed=0, global_batch=4, micro_batch=4, pad_token=0, length=None)
    early, late = (int(data.order().step_sequences(step)[0]) for step in (1, 4))
    context = Context({"run_dir": "run"}, "distill", turns=[{"step": 3, "changed": [], "skipped": [early, late]}])
    _tell_not_read(context, data, 5, None)
    assert context.turns[0]["not_read"] == [early]
    assert capsys.readouterr().out == (
        f"distill: resume.skip_sequences=[{early}]: not read from step 3 to the end at step 5, so that leaving them "
        f"out changes nothing\n"
    )
    context.turns[0].pop("not_read")
    _tell_not_read(context, data, 10, None)  # of the second epoch, all
    assert "not_read" not in context.turns[0]


def test_of_a_turn_that_a_later_one_left_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    data = PackedSequences(rows(20), None, seed=0, global_batch=4, micro_batch=4, pad_token=0, length=None)
    first, second = (int(data.order().step_sequences(step)[0]) for step in (0, 1))
    turns = [{"step": step, "changed": [], "skipped": [number]} for step, number in ((4, second), (2, first))]
    _tell_not_read(Context({"run_dir": "run"}, "distill", turns=turns), data, 5, None)
    assert [turn.get("not_read") for turn in turns] == [None, [first]]
    assert str([second]) not in capsys.readouterr().out


def test_validation_shows_every_row_once_and_keeps_ranks_together() -> None:
    batches = [in_turn(9, 2, rank, 2) for rank in range(2)]
    assert [len(b) for b in batches] == [3, 3]
    seen = [row for rank in batches for micro in rank for row in micro.sequences]
    assert sorted(row for row in seen if row >= 0) == list(range(9))


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7, "max_tokens": None, "epochs": None}, 7),
        ({"max_steps": None, "max_tokens": None, "epochs": 2}, 10),
        ({"max_steps": 3, "max_tokens": None, "epochs": 2}, 3),
    ],
)
def test_the_first_limit_ends_the_training(limits: dict[str, Any], steps: int) -> None:
    assert (
        PackedSequences(rows(20), None, seed=0, global_batch=4, micro_batch=4, pad_token=0, length=None).steps(**limits)
        == steps
    )


def test_max_tokens_stops_at_the_first_step_that_reaches_it() -> None:
    data = PackedSequences(rows(20), None, seed=0, global_batch=4, micro_batch=4, pad_token=0, length=None)
    steps = data.steps(max_steps=None, max_tokens=300, epochs=None)
    lengths = [data.order().step_length(step) for step in range(steps)]
    assert sum(lengths) >= 300 > sum(lengths[:-1])
