"""On-policy distillation: what the student writes, what is counted, and what no restart and no topology may change."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from models.errors import Refusal
from models.generation import Sampling
from models.heads import head_of, hidden_states
from models.objectives.adaptive_kl import AdaptiveKL
from models.objectives.alpha_beta import AlphaBeta
from models.objectives.chunked import _Compiled, objective_sum
from models.objectives.distillation import Distillation
from models.objectives.forward_kl import ForwardKL
from models.objectives.head import Head
from models.objectives.jensen_shannon import JensenShannon
from models.objectives.long_horizon import _LogRatio, _With, later, long_horizon_sum
from models.objectives.representation import Wanted
from models.objectives.reverse_kl import ReverseKL
from models.objectives.signal import Dense
from models.objectives.skew_forward_kl import SkewForwardKL
from models.objectives.skew_reverse_kl import SkewReverseKL
from models.objectives.top_k import TopK
from models.objectives.total_variation import TotalVariation
from models.targets import IGNORED
from models.teachers.online import Resident
from models.teachers.teacher import Opening
from models.training.on_policy import OnPolicy
from models.training.rollouts import Replica, Rollouts, ends_of
from models.training.saved import checkpoints
from pipeline.building import build
from pipeline.context import Context
from pipeline.data.batch import blank, collate
from pipeline.data.loader import PackedSequences
from pipeline.data.rows import Rows
from pipeline.training.fit import _tell_not_read
from tests.command import SMALL, train, unclocked
from tests.fitting import VOCABULARY, Scenario, answer_rows, fit, model, on_two_ranks, rollouts, write_models
from tests.test_config import quickstart, refused

TOLERANCE = 1e-6  # fp32, 20 steps
ALWAYS = {"share": 1.0, "sampling": {"temperature": 1.0, "max_new_tokens": 8}}
HALF = {**ALWAYS, "share": 0.5}
REPLAYED = {**ALWAYS, "share": 0.7, "replay_capacity": 24, "replay_share": 0.5}
MINILLM = {**ALWAYS, "long_horizon": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("on-policy")
    write_models(made)
    return made


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = TOLERANCE, first: int = 0) -> None:
    for mine, theirs in zip(one["metrics"][first:], other["metrics"], strict=True):
        assert unclocked(mine).keys() == unclocked(theirs).keys()
        for name in unclocked(mine):
            assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), (mine["step"], name)
    for name, tensor in one["state"].items():
        torch.testing.assert_close(tensor, other["state"][name], rtol=0, atol=tolerance, msg=name)
    if one["kept"] is not None:
        assert one["kept"]["counts"] == other["kept"]["counts"]
        for name in ("examples", "lengths", "ids"):
            assert torch.equal(one["kept"][name], other["kept"][name])


def test_without_a_share_it_is_plain_training_to_the_bit(folder: Path) -> None:
    plain = fit(Scenario("plain", answers=True), folder)
    never = fit(Scenario("never", on_policy={**ALWAYS, "share": 0.0}), folder)
    for step in never["metrics"]:
        assert (step.pop("on_policy_share"), step.pop("generated_tokens")) == (0, 0)
    never["kept"] = None
    assert_same(plain | {"kept": None}, never, tolerance=0)


def test_on_the_students_text_alone_the_datas_answers_are_not_looked_at(folder: Path) -> None:
    one, other = (fit(Scenario("looked", on_policy=ALWAYS, scrambled=scrambled), folder) for scrambled in (False, True))
    assert_same(one, other, tolerance=0)
    plain = [fit(Scenario("looked", answers=True, scrambled=scrambled), folder) for scrambled in (False, True)]
    assert plain[0]["metrics"][0]["loss"] != plain[1]["metrics"][0]["loss"]


def answers_of(result: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """(prompt, what was written) of what is kept, by the data's own definition of a prompt."""
    data, kept = answer_rows(), result["kept"]
    told = []
    for number, ids in zip(kept["examples"].tolist(), kept["ids"].split(kept["lengths"].tolist()), strict=True):
        row = data[number]
        told.append((row["input_ids"][: len(row["input_ids"]) - row["supervised"]], ids.tolist()))
    return told


def dense_divergence(student: Any, teacher: Any, prompt: list[int], ids: list[int]) -> float:
    """Forward KL at temperature 2, summed over the tokens that were written."""
    with torch.no_grad():
        logits, taught = (
            m(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / 2 for m in (student, teacher)
        )
    return F.kl_div(F.log_softmax(logits, -1), F.log_softmax(taught, -1), log_target=True, reduction="sum").item()


def test_the_loss_is_the_dense_formula_over_the_generated_tokens(folder: Path) -> None:
    result = fit(Scenario("dense", steps=1, on_policy={**ALWAYS, "replay_capacity": 8}), folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / n) for n in ("student-False-0.0", "teacher"))
    total, count, length = 0.0, 0, 0
    told = answers_of(result)
    assert len(told) == 8
    for prompt, ids in told:
        total += dense_divergence(student, teacher, prompt, ids)
        count, length = count + len(ids), length + len(prompt) + len(ids)
    first = result["metrics"][0]
    assert first["forward_kl"] == pytest.approx(4 * total / count, rel=1e-5)
    assert first["loss"] == pytest.approx(0.7 * 4 * total / count, rel=1e-5)
    assert (first["generated_tokens"], first["tokens"], first["on_policy_share"]) == (count, length, 1)
    assert "cross_entropy" not in first  # the student's own words are no truth
    assert all(ids[-1] == 0 or len(ids) == 8 for _, ids in told)
    assert all(0 not in ids[:-1] for _, ids in told)


@pytest.fixture(scope="module")
def of_the_first_step() -> list[int]:
    data = PackedSequences(answer_rows(), None, seed=0, global_batch=8, micro_batch=8, pad_token=0, length=None)
    return [int(number) for number in data.order().step_sequences(0)]


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_a_skipped_prompt_takes_no_part_and_the_others_are_as_without_it(
    folder: Path, of_the_first_step: list[int], micro_batch: int
) -> None:
    """Truth: the dense formula over the answers that the same step has without skipping, these two left out."""
    values = {**ALWAYS, "replay_capacity": 8}
    gone = {of_the_first_step[2]: 0, of_the_first_step[3]: 0}
    whole = fit(Scenario("whole", steps=1, on_policy=values), folder)
    skipping = fit(Scenario("skipping", steps=1, micro_batch=micro_batch, on_policy=values, skipped=gone), folder)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / n) for n in ("student-False-0.0", "teacher"))
    total, count, length = 0.0, 0, 0
    for number, (prompt, ids), (_, kept) in zip(
        of_the_first_step, answers_of(whole), answers_of(skipping), strict=True
    ):
        assert kept == ([] if number in gone else ids)
        if number in gone:
            continue
        total += dense_divergence(student, teacher, prompt, ids)
        count, length = count + len(ids), length + len(prompt) + len(ids)
    first = skipping["metrics"][0]
    assert first["forward_kl"] == pytest.approx(4 * total / count, rel=1e-5)
    assert (first["generated_tokens"], first["tokens"]) == (count, length)
    assert first["forward_kl"] != pytest.approx(whole["metrics"][0]["forward_kl"], rel=1e-4)


@pytest.mark.parametrize("values", [ALWAYS, HALF, REPLAYED, MINILLM], ids=["always", "half", "replayed", "minillm"])
def test_nothing_that_is_learnt_depends_on_a_skipped_example(
    folder: Path, of_the_first_step: list[int], values: dict[str, Any]
) -> None:
    scenario = Scenario("gone", on_policy=values, divergence="ReverseKL" if values is MINILLM else "ForwardKL")
    gone = of_the_first_step[0]
    plain, *replaced = (fit(replace(scenario, replaced=other), folder) for other in (None, gone))
    assert plain["metrics"][0]["loss"] != replaced[0]["metrics"][0]["loss"]
    skipping = replace(scenario, skipped={gone: 0})
    one, other = (fit(replace(skipping, replaced=other), folder) for other in (None, gone))
    assert_same(one, other, tolerance=0)
    # The others come when they would have come: in the buffer, the numbers of the same examples.
    assert torch.equal(one["kept"]["examples"], plain["kept"]["examples"])


def test_an_answer_that_was_kept_is_not_read_again_once_its_example_is_skipped() -> None:
    rolls = rolls_of(answer_rows(), replay_capacity=8, replay_share=1.0)
    rolls.begin(model(16, 2, seed=1), 0, device=torch.device("cpu"))
    of_numbers = {answered.number: answered.ids for answered in rolls.buffer}
    gone = rolls.buffer[3].number
    rolls.skipped = {gone: 7}
    for step in (6, 7):
        rolls.begin(torch.nn.Identity(), step, device=torch.device("cpu"))  # nothing is written any more
        batch = rolls.take({"input_ids": torch.zeros(1), "sequences": [0] * 8}, 0)
        expected = {number: ids for number, ids in of_numbers.items() if step < 7 or number != gone}
        assert sorted(batch["sequences"]) == sorted([*expected, *([-1] * (step - 6))])
        for line, number in enumerate(batch["sequences"]):
            targets = batch["targets"][line]
            assert targets[targets >= 0].tolist() == expected.get(number, [])
        assert batch["step_tokens"] == sum(map(len, expected.values()))


def test_a_prompt_that_comes_no_more_is_not_said_to_change_nothing_where_its_answer_is_read_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = PackedSequences(answer_rows(), None, seed=0, global_batch=8, micro_batch=8, pad_token=0, length=None)
    rolls = rollouts({**ALWAYS, "replay_capacity": 8, "replay_share": 1.0}, data, torch.nn.Identity)
    rolls.begin(model(16, 2, seed=1), 0, device=torch.device("cpu"))
    rolls.begin(torch.nn.Identity(), 1, device=torch.device("cpu"))  # nothing is written any more
    read = rolls.take({"input_ids": torch.zeros(1), "sequences": [0] * 8}, 0)["sequences"]
    gone = next(number for number in read if not data.order().read_between([number], 1, 3))
    turn: dict[str, Any] = {"step": 1, "changed": [], "skipped": [gone]}
    context = Context({"run_dir": "run"}, "distill", turns=[turn])
    _tell_not_read(context, data, 3, rolls.values)
    assert (capsys.readouterr().out, "not_read" in turn) == ("", False)
    _tell_not_read(context, data, 3, replace(rolls.values, replay_capacity=0))
    assert turn["not_read"] == [gone]


@pytest.mark.parametrize("values", [ALWAYS, MINILLM], ids=["always", "minillm"])
def test_a_step_of_skipped_examples_alone_learns_nothing(
    folder: Path, of_the_first_step: list[int], values: dict[str, Any]
) -> None:
    result = fit(
        Scenario(
            "none", steps=1, on_policy=values, divergence="ReverseKL" if values is MINILLM else "ForwardKL",
            skipped=dict.fromkeys(of_the_first_step, 0),
        ),
        folder,
    )  # fmt: skip
    (step,) = result["metrics"]
    assert (step["loss"], step["grad_norm"], step["generated_tokens"]) == (0, 0, 0)


def test_what_is_written_is_what_the_student_says(folder: Path) -> None:
    sampling = {"temperature": 0.0, "max_new_tokens": 8}
    result = fit(
        Scenario("greedy", steps=1, on_policy={"share": 1, "sampling": sampling, "replay_capacity": 8}), folder
    )
    student = AutoModelForCausalLM.from_pretrained(folder / "student-False-0.0")
    for prompt, ids in answers_of(result):
        ours = torch.tensor([prompt])
        said = student.generate(ours, attention_mask=torch.ones_like(ours), max_new_tokens=8, do_sample=False)
        assert said[0, len(prompt) :].tolist() == ids


def test_every_second_step_is_a_share_of_a_half(folder: Path) -> None:
    values = OnPolicy(Sampling(temperature=1.0), share=0.5)
    rolls = Rollouts(
        values, examples=[], step_examples=lambda step: [], collate=dict, load_student=torch.nn.Identity, seed=3,
        pad_token=0, end_tokens=[], skipped=None,
    )  # fmt: skip
    due = [rolls.due(step) for step in range(2000)]
    assert 0.46 < sum(due) / len(due) < 0.54
    metrics = fit(Scenario("half", on_policy=HALF), folder)["metrics"]
    on = [step for step in metrics if "cross_entropy" not in step]
    assert 4 < len(on) < 16
    assert metrics[-1]["on_policy_share"] == len(on) / 20


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    """One process, the whole batch at once."""
    return fit(Scenario("reference", on_policy=REPLAYED), folder)


@pytest.mark.parametrize("micro_batch", [2, 1])
def test_micro_batches_change_nothing(folder: Path, reference: Any, micro_batch: int) -> None:
    assert_same(fit(Scenario("micro", micro_batch=micro_batch, on_policy=REPLAYED), folder), reference)


def test_padding_on_the_left_changes_nothing(folder: Path, reference: Any) -> None:
    assert_same(fit(Scenario("left", side="left", on_policy=REPLAYED), folder), reference)


SKIPPED = {3: 2, 8: 6, 21: 6}  # each is met again in the second, third and fourth epoch, of five steps each

TWO_RANKS = [
    Scenario("ddp", "ddp", micro_batch=1, on_policy=REPLAYED),
    Scenario("ddp-minillm", "ddp", micro_batch=2, on_policy=MINILLM, divergence="ReverseKL"),
    Scenario("ddp-layers", "ddp", micro_batch=2, on_policy=HALF, layers=True),
    Scenario("ddp-sharded", "ddp", micro_batch=4, on_policy=REPLAYED, sharded=True),
    Scenario("zero2", "zero2", micro_batch=2, on_policy=REPLAYED),
    Scenario("zero3-skipping", "zero3", micro_batch=2, on_policy=REPLAYED, skipped=SKIPPED),
    Scenario("zero3", "zero3", micro_batch=2, on_policy=REPLAYED, checkpoint_at=9),
    Scenario("zero3_offload", "zero3_offload", micro_batch=4, on_policy=REPLAYED, activation_checkpointing=True),
    Scenario("zero3-minillm", "zero3", micro_batch=4, on_policy=MINILLM, divergence="ReverseKL", sharded=True),
    Scenario("zero3-lora_head", "zero3", micro_batch=4, on_policy=ALWAYS, lora_head=True),
    Scenario("zero3-bf16", "zero3", micro_batch=4, on_policy=ALWAYS, precision="bf16-mixed"),
]


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, dict[str, Any]]:
    return on_two_ranks(TWO_RANKS, folder)


@pytest.mark.parametrize("name", ["ddp", "ddp-sharded", "zero2", "zero3", "zero3_offload"])
def test_two_ranks_write_and_learn_what_one_does(two_ranks: Any, reference: Any, name: str) -> None:
    assert_same(two_ranks[name], reference)


def test_two_ranks_skip_what_one_does(folder: Path, two_ranks: Any, reference: Any) -> None:
    alone = fit(Scenario("skipping", on_policy=REPLAYED, skipped=SKIPPED), folder)
    assert_same(two_ranks["zero3-skipping"], alone)
    losses = [[step["loss"] for step in run["metrics"]] for run in (alone, reference)]
    assert losses[0][:2] == losses[1][:2]
    assert losses[0][2:] != losses[1][2:]


def test_two_ranks_follow_the_long_horizon_as_one_does(folder: Path, two_ranks: Any) -> None:
    alone = fit(Scenario("minillm", on_policy=MINILLM, divergence="ReverseKL"), folder)
    for name in ("ddp-minillm", "zero3-minillm"):  # returns are long sums, whose rounding depends on the CPU
        assert_same(two_ranks[name], alone, tolerance=3 * TOLERANCE)
    short = fit(Scenario("short", on_policy=ALWAYS, divergence="ReverseKL"), folder)
    assert short["metrics"][0]["loss"] == alone["metrics"][0]["loss"]  # the value is the divergence's
    assert short["metrics"][0]["grad_norm"] != alone["metrics"][0]["grad_norm"]


def test_layers_are_compared_on_the_students_text_too(folder: Path, two_ranks: Any) -> None:
    alone = fit(Scenario("layers", on_policy=HALF, layers=True), folder)
    for one, other in zip(two_ranks["ddp-layers"]["metrics"], alone["metrics"], strict=True):
        for name in ("loss", "hidden_states", "attention_relations"):
            assert one[name] == pytest.approx(other[name], rel=1e-4)


def test_a_low_rank_head_under_zero3_writes_as_it_does_alone(folder: Path, two_ranks: Any) -> None:
    assert_same(two_ranks["zero3-lora_head"], fit(Scenario("lora", on_policy=ALWAYS, lora_head=True), folder))


@pytest.mark.parametrize("name", ["zero3", "zero3_offload", "zero3-lora_head", "zero3-bf16"])
def test_what_writes_under_zero3_is_the_student(two_ranks: Any, name: str) -> None:
    result = two_ranks[name]
    assert result["replica"].keys() == result["state"].keys()
    for weight, tensor in result["replica"].items():
        assert torch.equal(tensor, result["state"][weight]), weight


@pytest.mark.parametrize("name", ["zero3", "zero3_offload"])
def test_under_zero3_ranks_speak_as_often_for_long_text_as_for_short(two_ranks: Any, name: str) -> None:
    short, long = two_ranks[name]["collectives"]
    assert 0 < short == long < 60  # 21 weights are gathered, once each


def test_text_kept_is_read_again_and_costs_nothing(reference: Any) -> None:
    counts = [step["generated_tokens"] for step in reference["metrics"]]
    on = [0.0, *(step["on_policy_share"] * step["step"] for step in reference["metrics"])]
    fresh = [after > before for before, after in zip([0, *counts], counts, strict=False)]
    due = [after > before + 0.5 for before, after in pairwise(on)]
    assert sum(fresh) < sum(due) < 20
    assert sum(fresh) >= 3  # the buffer has to be full first
    assert len(reference["kept"]["examples"]) == 24


def test_a_single_process_resumes_to_the_bit_with_its_buffer(folder: Path) -> None:
    whole = fit(Scenario("saving", micro_batch=4, checkpoint_at=9, dropout=0.1, on_policy=REPLAYED), folder)
    resumed = fit(Scenario("saving", micro_batch=4, resume=True, dropout=0.1, on_policy=REPLAYED), folder)
    assert_same(whole, resumed, tolerance=0, first=9)


def test_zero3_resumes_to_the_bit_with_its_buffer(folder: Path, two_ranks: Any) -> None:
    resumed = on_two_ranks([Scenario("zero3", "zero3", micro_batch=2, resume=True, on_policy=REPLAYED)], folder)
    assert_same(two_ranks["zero3"], resumed["zero3"], tolerance=0, first=9)


def test_resumed_without_its_buffer_it_would_learn_something_else(folder: Path) -> None:
    """That the test above would notice."""
    whole = fit(Scenario("emptied", micro_batch=4, checkpoint_at=9, on_policy=REPLAYED), folder)
    (checkpoint,) = checkpoints(folder / "saved" / "emptied")
    path = checkpoint / "rank-00000.safetensors"
    saved = load_file(path)
    saved["|on_policy.ids"] = (saved["|on_policy.ids"] + 1).clamp(max=VOCABULARY - 1)
    save_file(saved, path)
    resumed = fit(Scenario("emptied", micro_batch=4, resume=True, on_policy=REPLAYED), folder)
    assert whole["metrics"][-1]["loss"] != resumed["metrics"][-1]["loss"]


@pytest.mark.parametrize("strategy", ["bf16", "zero3-bf16"])
def test_in_bf16_every_weight_learns_from_the_students_text(folder: Path, two_ranks: Any, strategy: str) -> None:
    """Weights that autocast has copied without graph would get no gradient."""
    alone = functools.partial(fit, Scenario("bf16", precision="bf16-mixed", on_policy=ALWAYS), folder)
    state = (two_ranks[strategy] if strategy in two_ranks else alone())["state"]
    start = AutoModelForCausalLM.from_pretrained(folder / "student-False-0.0").state_dict()
    for name, tensor in state.items():
        assert (tensor.float() - start[name]).abs().max() > 1e-3, name


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")  # its new name came after 5.17
def test_dropout_and_activation_checkpointing_leave_the_written_text_alone(folder: Path) -> None:
    plain, other = (
        fit(Scenario("kept", steps=1, on_policy={**ALWAYS, "replay_capacity": 8}, **more), folder)  # type: ignore[arg-type]
        for more in ({}, {"dropout": 0.1, "activation_checkpointing": True})
    )
    assert torch.equal(plain["kept"]["ids"], other["kept"]["ids"])


def test_columns_beyond_the_tokenizer_are_never_written(folder: Path, reference: Any) -> None:
    padded = AutoModelForCausalLM.from_pretrained(folder / "student-False-0.0")
    torch.manual_seed(5)
    padded.resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)
    padded.lm_head.weight.data[VOCABULARY:] += 3
    padded.save_pretrained(folder / "student-padded")
    result = fit(Scenario("padded", student="student-padded", on_policy=REPLAYED), folder)
    result["state"] = {n: t[:VOCABULARY] if len(t) == VOCABULARY + 7 else t for n, t in result["state"].items()}
    assert_same(result, reference)


# One step, without a trainer


def rolls_of(data: Rows, **values: Any) -> Rollouts:
    rows = PackedSequences(data, None, seed=0, global_batch=8, micro_batch=8, pad_token=0, length=None)
    return rollouts({**ALWAYS, **values}, rows, torch.nn.Identity)


def begun(data: Rows, writer: Any = None, **values: Any) -> tuple[Rollouts, dict[str, Any]]:
    rolls = rolls_of(data, **values)
    rolls.begin(model(16, 2, seed=1) if writer is None else writer, 0, device=torch.device("cpu"))
    return rolls, rolls.take({"input_ids": torch.zeros(1), "sequences": [0] * 8}, 0)


DIVERGENCES = [
    *(ForwardKL(2.0), ReverseKL(), JensenShannon(beta=0.3), SkewForwardKL(), SkewReverseKL(), TotalVariation()),
    *(AdaptiveKL(), AlphaBeta(), TopK(5, ForwardKL())),
]


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda divergence: divergence.name)
def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_its_text(divergence: Any) -> None:
    student = model(16, 2, seed=1)
    rolls, batch = begun(answer_rows(), student)
    hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
    objective = rolls.objective(Distillation(0.5, divergence))
    total, parts = objective_sum(
        objective, hidden, head_of(student), batch["targets"], Dense(hidden.detach(), head_of(student))
    )
    total.backward()
    assert list(parts) == [divergence.name]
    assert abs(total.item()) < 1e-6
    for parameter in student.parameters():
        assert parameter.grad is None or parameter.grad.abs().max() < 1e-6


def test_a_row_is_the_prompt_and_what_was_written_and_all_of_that_is_supervised() -> None:
    data = answer_rows()
    rolls, batch = begun(data, replay_capacity=8)
    for line, answered in enumerate(rolls.buffer):
        row = data[answered.number]
        prompt = row["input_ids"][: len(row["input_ids"]) - row["supervised"]]
        length = len(prompt) + len(answered.ids)
        assert batch["input_ids"][line, :length].tolist() == prompt + answered.ids
        assert batch["position_ids"][line, :length].tolist() == list(range(length))
        assert batch["targets"][line, len(prompt) - 1 : length - 1].tolist() == answered.ids
        assert (batch["targets"][line] >= 0).sum() == len(answered.ids)
    assert batch["sequences"] == [answered.number for answered in rolls.buffer]
    assert batch["step_tokens"] == sum(len(answered.ids) for answered in rolls.buffer) == (batch["targets"] >= 0).sum()


@pytest.mark.parametrize(("world", "micro_batch"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
def test_every_row_of_a_step_is_taken_once_where_the_order_would_have_it(world: int, micro_batch: int) -> None:
    rows = PackedSequences(
        answer_rows(), None, seed=0, global_batch=8, micro_batch=micro_batch, pad_token=0, length=None
    )
    rolls, _ = begun(answer_rows())
    for rank in range(world):
        order = iter(rows.order(rank, world))
        for micro in range(8 // (world * micro_batch)):
            wanted = next(order).sequences
            taken = rolls.take({"input_ids": torch.zeros(1), "sequences": wanted}, micro, rank=rank, world=world)
            assert taken["sequences"] == wanted
            assert len(taken["input_ids"]) == micro_batch


def same_prompts() -> Rows:
    row = {"input_ids": [7, 8, 0], "position_ids": [0, 1, 2], "targets": [-100, 0, -100], "supervised": 1, "bytes": 0}
    return Rows([row] * 8)


def test_equal_prompts_get_answers_of_their_own() -> None:
    rolls, _ = begun(same_prompts(), replay_capacity=8)
    assert len({tuple(answered.ids) for answered in rolls.buffer}) == 8
    greedy, _ = begun(same_prompts(), replay_capacity=8, sampling={"max_new_tokens": 8})
    assert len({tuple(answered.ids) for answered in greedy.buffer}) == 1


def test_another_step_and_another_seed_write_another_text() -> None:
    texts = []
    for step, seed in ((0, 0), (5, 0), (0, 1)):
        rolls = rolls_of(answer_rows(), replay_capacity=8)
        rolls.seed = seed
        order = rolls.step_examples
        rolls.step_examples = lambda _, order=order: order(0)  # type: ignore[misc]
        rolls.begin(model(16, 2, seed=1), step, device=torch.device("cpu"))
        texts.append([answered.ids for answered in rolls.buffer])
    assert texts[0] != texts[1]
    assert texts[0] != texts[2]


def test_the_buffer_keeps_the_newest_and_comes_back_from_its_state() -> None:
    rolls = rolls_of(answer_rows(), replay_capacity=12, replay_share=0.0)
    student = model(16, 2, seed=1)
    for step in range(3):
        rolls.begin(student, step, device=torch.device("cpu"))
    newest = [*rolls.step_examples(1)[-4:], *rolls.step_examples(2)]  # type: ignore[index]
    assert [answered.number for answered in rolls.buffer] == [int(number) for number in newest]
    back = rolls_of(answer_rows(), replay_capacity=12)
    back.load(*rolls.state())
    assert back.buffer == rolls.buffer
    assert (back.steps, back.generated_tokens) == (3, rolls.generated_tokens)
    without, _ = begun(answer_rows())  # nothing is kept
    rolls_of(answer_rows()).load(*without.state())


def test_a_weighted_row_gives_its_weight_to_what_is_written() -> None:
    data = answer_rows()
    weights = [0.5 + number % 3 for number in range(len(data))]
    data = data.add_column(
        "weights", [[w * (t >= 0) for t in r["targets"]] for w, r in zip(weights, data, strict=True)]
    )
    data = data.add_column("weight", [w * r["supervised"] for w, r in zip(weights, data, strict=True)])
    rolls, batch = begun(data, replay_capacity=8)
    assert batch["step_tokens"] == pytest.approx(sum(weights[a.number] * len(a.ids) for a in rolls.buffer))
    for line, answered in enumerate(rolls.buffer):
        assert set(batch["weights"][line][batch["targets"][line] >= 0].tolist()) == {weights[answered.number]}
        assert batch["weights"][line][batch["targets"][line] < 0].abs().sum() == 0


@pytest.mark.parametrize("prompts", [[], [[5, 6], []]], ids=["plain", "teachers"])
def test_in_a_skipped_examples_place_stands_the_blank_sequence_of_the_data(prompts: list[list[int]]) -> None:
    data = answer_rows()
    data = data.add_column("weights", [[0.5 * (t >= 0) for t in row["targets"]] for row in data])
    data = data.add_column("weight", [0.5 * row["supervised"] for row in data])
    if prompts:
        data = with_teachers_prompts(data, *prompts)
    rolls = rolls_of(data)
    numbers = [int(number) for number in rolls.step_examples(0)]
    rolls.skipped = {numbers[5]: 0}
    rolls.begin(model(16, 2, seed=1), 0, device=torch.device("cpu"))
    batch = rolls.take({"input_ids": torch.zeros(1), "sequences": [0] * 8}, 0)
    truth = collate([blank(data.column_names, 0)], pad_token=0)
    assert batch["sequences"] == [*numbers[:5], -1, *numbers[6:]]
    for name, values in truth.items():
        assert torch.equal(batch[name][5, :1], values[0]), name
    assert not (batch["targets"][5] >= 0).any()
    assert batch["step_tokens"] == batch["weights"].sum()


def test_plain_text_can_be_given_a_longer_prompt() -> None:
    row = {"input_ids": [9, 1, 2, 3, 4, 0], "position_ids": [*range(6)], "targets": [1, 2, 3, 4, 0, -100]}
    data = Rows([row | {"supervised": 5, "bytes": 0}] * 8)
    for asked, prompt in ((1, [9]), (3, [9, 1, 2]), (50, [9, 1, 2, 3, 4])):
        _, batch = begun(data, prompt_tokens=asked)
        first = (batch["targets"] >= 0).long().argmax(1)
        assert first.tolist() == [len(prompt) - 1] * 8
        assert batch["input_ids"][:, : len(prompt)].tolist() == [prompt] * 8


def with_teachers_prompts(data: Rows, *before: list[int]) -> Rows:
    """The same rows, whose teacher reads other tokens before each prompt."""
    columns: dict[str, list[Any]] = {"teacher_input_ids": [], "teacher_position_ids": [], "teacher_targets": []}
    for row in data:
        ids = [more + row["input_ids"] for more in before]
        columns["teacher_input_ids"].append([token for part in ids for token in part])
        columns["teacher_position_ids"].append([at for part in ids for at in range(len(part))])
        columns["teacher_targets"].append([t for more in before for t in [-100] * len(more) + row["targets"]])
    for name, values in columns.items():
        data = data.add_column(name, values)
    return data


def test_a_teacher_with_prompts_of_its_own_reads_them_before_the_students_text() -> None:
    rolls, batch = begun(with_teachers_prompts(answer_rows(), [5, 6, 7], []), replay_capacity=8)
    plain, _ = begun(answer_rows(), replay_capacity=8)
    assert rolls.buffer == plain.buffer
    for line, answered in enumerate(rolls.buffer):
        positions, targets = batch["teacher_position_ids"][line], batch["teacher_targets"][line]
        begins = (positions == 0).nonzero()[:, 0].tolist()
        assert batch["teacher_input_ids"][line, :3].tolist() == [5, 6, 7]
        for begin, end in ((begins[0], begins[1]), (begins[1], begins[1] + begins[1] - 3)):
            part = targets[begin:end]
            assert part[part >= 0].tolist() == answered.ids
            at = int((part >= 0).long().argmax())
            read = batch["teacher_input_ids"][line, begin + at + 1 : begin + at + 1 + len(answered.ids)]
            assert read.tolist() == answered.ids


@pytest.mark.parametrize("before", [[[]], [[], []]])
def test_where_the_teachers_prompts_are_the_students_it_says_the_same(before: list[list[int]]) -> None:
    student, teacher = model(16, 2, seed=1), model(32, 2, seed=2).eval()
    totals = []
    for data in (answer_rows(), with_teachers_prompts(answer_rows(), *before)):
        _, batch = begun(data, student)
        resident = Resident(teacher, Opening(VOCABULARY, packed=False))
        looked = resident.look(batch, Wanted())
        hidden = hidden_states(student, batch["input_ids"], batch["position_ids"])
        arguments = (ReverseKL(), hidden, head_of(student), batch["targets"])
        for summed in (objective_sum, functools.partial(long_horizon_sum, length_normalised=True)):
            student.zero_grad()
            resident.give(looked, lambda signal, f=summed, a=arguments: f(*a, signal))[0].backward(retain_graph=True)
            totals.append(student.lm_head.weight.grad.clone())
    for one, other in zip(totals[:2], totals[2:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_a_chat_turns_end_or_a_tasks_separator_ends_what_is_written() -> None:
    def rows(*answers: list[int]) -> list[dict[str, Any]]:
        return [{"targets": [-100, *answer, -100, -100]} for answer in answers]

    assert ends_of(rows([4, 5, 9], [6, 9], [7, 7, 9])) == [9]
    assert ends_of(rows([4, 9, 9], [9, 9], [7, 7, 9])) == []  # it stands inside as well
    assert ends_of(rows([4, 5], [6, 7], [7, 8])) == []  # windows of longer texts


def test_a_copy_of_the_student_outside_zero3_is_not_made(folder: Path) -> None:
    rolls, _ = begun(answer_rows())
    assert isinstance(rolls.replica, Replica)
    assert rolls.replica.model is None


# The long horizon


def ratios(hidden: Tensor, weight: Tensor, taught: Tensor, targets: Tensor) -> Tensor:
    """log q / p of each target, fp64[B, T]."""
    logq, logp = (
        z.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] for z in (hidden @ weight.T, taught)
    )
    return logq - logp


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_long_horizons_gradient_is_the_dense_policy_gradient(normalised: bool, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher_hidden = torch.randn(3, 7, 4, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(11, 4, generator=generator, dtype=torch.float64)
    targets = torch.randint(11, (3, 7), generator=generator)
    targets[0, :3] = targets[1, 4:] = IGNORED
    weights = torch.rand(3, 7, generator=generator, dtype=torch.float64) if weighted else None
    taught = teacher_hidden @ teacher_weight.T

    total, parts = long_horizon_sum(
        Distillation(0.25, ReverseKL(weight=2.0)),
        hidden,
        Head(weight),
        targets,
        Dense(teacher_hidden, Head(teacher_weight)),
        length_normalised=normalised,
        weights=weights,
        chunk_tokens=4,
    )
    got = torch.autograd.grad(total, (hidden, weight))
    assert set(parts) == {"cross_entropy", "reverse_kl"}

    logq, logp = (hidden @ weight.T).log_softmax(-1), taught.log_softmax(-1)
    cost = ratios(hidden, weight, taught, targets).detach()
    expected = torch.zeros((), dtype=torch.float64)
    surrogate = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        places = [at for at in range(7) if targets[row, at] >= 0]
        for number, at in enumerate(places):
            w = 1.0 if weights is None else weights[row, at].item()
            rest = [cost[row, after].item() for after in places[number + 1 :]]
            behind = sum(rest) / (len(rest) if normalised and rest else 1)
            own = logq[row, at, targets[row, at]]
            expected = expected + w * (-0.25 * own + 0.75 * 2 * (logq[row, at].exp() * (logq - logp)[row, at]).sum())
            surrogate = surrogate + w * 0.75 * 2 * behind * own
    assert total.item() == pytest.approx(expected.item(), rel=1e-12)
    for one, other in zip(got, torch.autograd.grad(expected + surrogate, (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_single_step_and_long_horizon_are_the_exact_gradient_of_the_sequences_kl() -> None:
    """Over all 3⁴ sequences, each with its probability: nothing is sampled."""
    tokens, length = 3, 4
    sequences = torch.cartesian_prod(*[torch.arange(tokens)] * length)
    prefixes = {tuple(s[:n].tolist()): 0 for n in range(length) for s in sequences}
    place = {prefix: number for number, prefix in enumerate(prefixes)}
    at = torch.tensor([[place[tuple(s[:n].tolist())] for n in range(length)] for s in sequences])
    generator = torch.Generator().manual_seed(1)
    table, taught = (torch.randn(len(place), 6, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, teacher_weight = (torch.randn(tokens, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    table.requires_grad_()
    weight.requires_grad_()

    logs = [
        (states @ matrix.T).log_softmax(-1)[at].gather(-1, sequences[..., None])[..., 0].sum(1)
        for states, matrix in ((table, weight), (taught, teacher_weight))
    ]
    exact = (logs[0].exp() * (logs[0] - logs[1])).sum()
    wanted = torch.autograd.grad(exact, (table, weight))
    chances = logs[0].detach().exp()[:, None].expand(-1, length)
    given = (ReverseKL(), table[at], Head(weight), sequences, Dense(taught[at], Head(teacher_weight)))
    total, _ = long_horizon_sum(*given, length_normalised=False, weights=chances)
    assert total.item() == pytest.approx(exact.item(), rel=1e-12)
    for one, other in zip(torch.autograd.grad(total, (table, weight)), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    alone, _ = objective_sum(*given, weights=chances)
    assert (torch.autograd.grad(alone, weight)[0] - wanted[1]).abs().max() > 1e-3  # it takes both parts


def test_the_rest_of_a_row_is_summed_or_averaged() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    counted = torch.tensor([[True, True, True, True], [False, True, False, True]])
    assert later(values, counted, mean=False).tolist() == [[14, 12, 8, 0], [10, 8, 8, 0]]
    assert later(values, counted, mean=True)[0].tolist() == pytest.approx([14 / 3, 6, 8, 0])
    assert later(values, counted, mean=True)[1].tolist() == [5, 8, 8, 0]


def test_a_batch_without_a_supervised_token_is_zero() -> None:
    hidden, head = torch.randn(2, 3, 4).requires_grad_(), Head(torch.randn(5, 4))
    targets = torch.full((2, 3), IGNORED)
    total, _ = long_horizon_sum(
        ReverseKL(), hidden, head, targets, Dense(hidden.detach(), head), length_normalised=True
    )
    total.backward()
    assert total.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


def test_what_remembers_values_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled it would forget them; the terms beside it are compiled as always."""
    monkeypatch.setattr(torch, "compile", lambda method, **_: "compiled")
    ratio = _LogRatio()
    other, kept = (term for _, term in _Compiled(_With(ReverseKL(1.2345), ratio)).terms)  # compiled terms are kept
    assert other.add == "compiled"  # type: ignore[comparison-overlap]
    assert kept is ratio


# From the command line


@pytest.mark.parametrize("name", ["gkd", "minillm", "distillm"])
def test_every_choice_composes_and_is_built(name: str) -> None:
    made = build(quickstart(f"on_policy={name}"), "distill").on_policy
    assert isinstance(made, OnPolicy)
    assert made.long_horizon == (name == "minillm")
    assert bool(made.replay_capacity) == (name == "distillm")
    assert build(quickstart(), "distill").on_policy is None


ON = "on_policy=gkd"
AT = "on_policy"
UNPACKED = "data.packing=false"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([ON], ["data.packing=true", "packing=false"]),
        ([ON, UNPACKED, "objective.alpha=1.0"], ["asks no teacher"]),
        ([ON, UNPACKED, "teacher=cached"], ["cached or served", "teacher=online"]),
        ([ON, UNPACKED, "stages.distill.training.max_tokens=1000"], ["max_tokens=1000", "max_steps or epochs"]),
        ([ON, UNPACKED, f"{AT}.sampling.max_new_tokens=1000"], ["max_new_tokens=1000", "max_length=128"]),
        ([ON, UNPACKED, f"{AT}.share=2"], ["on_policy.share=2"]),
        ([ON, UNPACKED, f"{AT}.replay_capacity=3"], ["replay_capacity=3", "global_batch=8"]),
        ([ON, UNPACKED, f"{AT}.long_horizon=true"], ["divergence=reverse_kl"]),
        ([ON, UNPACKED, f"{AT}.long_horizon=true", f"{AT}.sampling.top_p=0.9"], ["top_p=0.9"]),
        ([ON, UNPACKED, f"{AT}.long_horizon=true", f"{AT}.replay_capacity=9"], ["replay_capacity=0"]),
        ([ON, UNPACKED, f"+{AT}.sampling.samples=2"], ["samples=2"]),
        ([ON, UNPACKED, f"+{AT}.shar=2"], ["shar", "did you mean share?"]),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(words: list[str], told: list[str]) -> None:
    message = refused(*words)
    assert "\n" not in message
    for part in told:
        assert part in message


def test_a_student_of_another_tokenizer_is_refused() -> None:
    values = OnPolicy(Sampling(temperature=1.0))
    from types import SimpleNamespace

    from pipeline.training.combinations import Combination

    stage: Any = build(quickstart(UNPACKED), "distill")
    words = {"objective": stage.objective, "data": stage.data, "training": stage.training}
    recipe: Any = SimpleNamespace(on_policy=values, align=True, **words)
    context: Any = SimpleNamespace(stage="distill")
    with pytest.raises(Refusal, match="align=true with on_policy"):
        Combination(context, recipe, stage.teacher, stage.student, None, None)._check_on_policy()


@pytest.mark.slow
def test_a_run_from_the_command_line_writes_learns_and_tells(tmp_path: Path) -> None:
    words = ["on_policy=distillm", f"{AT}.replay_capacity=16", f"{AT}.prompt_tokens=8"]
    words += [f"{AT}.sampling.max_new_tokens=8", UNPACKED, "stages=[pretrain,distill]"]
    done = train(f"run_dir={tmp_path}/run", *SMALL, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "distill" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "loss" in line][-1]
    assert last["step"] == 12
    assert 0 < last["on_policy_share"] < 1
    assert last["generated_tokens"] > 0
    assert (tmp_path / "run" / "distill" / "model.safetensors").exists()
