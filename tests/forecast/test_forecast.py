"""`forecast=true`: from a config.json alone, for GPUs that are elsewhere."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from models.errors import Refusal
from pipeline.check import check
from pipeline.config import selected
from pipeline.forecast.payoff import verdict
from tests.command import train
from tests.staged import composed
from tests.test_config import EXPERIMENTS, GIVEN

LLAMA_2_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
}
TINY = LLAMA_2_7B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}
P, T = 1_071_681_536, 6_738_415_616  # of four layers, and of the teacher: the published count
HEAD = 32000 * 4096


def folder(tmp_path: Path, config: dict[str, Any], name: str = "teacher") -> Path:
    """A model of which nothing but its config is there."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path / name


def forecast(tmp_path: Path, *words: str) -> dict[str, dict[str, Any]]:
    config = composed(tmp_path / "run", *words)
    rows = check({"config": config, "stages": selected(config)}, tmp_path)["forecast"]
    assert not (tmp_path / "run").exists()
    return {row["stage"]: row for row in rows}


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """7B → 1B on 64 GPUs, of the stage distill."""
    tmp_path = tmp_path_factory.mktemp("flagship")
    words = [f"teacher.path={folder(tmp_path, LLAMA_2_7B)}", "only=[distill]", *A100]
    return forecast(tmp_path, "+experiment=distill_7b_to_1b", *words)["distill"]


A100 = [
    "forecast.show=true",
    "forecast.gpus=64",
    "forecast.efficiency=0.5",
    "forecast.gpu=a100",
    "forecast.gpus_per_node=4",
]


def test_7b_to_1b_holds_what_zero3_shards(row: dict[str, Any]) -> None:
    """ZeRO, arXiv:1910.02054: of mixed-precision Adam 12 bytes a parameter of optimizer, here 4 of gradients (summed in
    fp32) and 2 of weights, each over the ranks; DeepSpeed gathers up to so many parameters for the layers at work."""
    assert row["parameters"] == P
    assert row["optimizer_bytes"] == pytest.approx(12 * P / 64, rel=1e-3)
    assert row["gradients_bytes"] == pytest.approx(4 * P / 64, rel=1e-6)
    assert row["teacher_bytes"] == pytest.approx(2 * T / 64 + 2 * HEAD, rel=1e-3)
    gathered = 2 * (500_000_000 + 50_000_000 + HEAD)
    assert row["parameters_bytes"] == pytest.approx(2 * P / 64 + gathered, rel=1e-3)
    assert row["buffers_bytes"] == 2 * 500_000_000  # DeepSpeed's reduce_bucket_size, in bf16
    parts = ("parameters", "gradients", "optimizer", "teacher", "activations", "engine", "buffers")
    assert row["device_bytes"] == sum(row[f"{part}_bytes"] for part in parts)
    assert row["fits"]
    assert row["checkpoint_bytes"] == 2 * 12 * P  # two are kept: weights and two moments
    assert row["data_bytes"] == 3 * 10**10  # of a vocabulary of 32,000: two a token, and less than one of the index


def test_operations_are_those_of_both_models_and_the_loss(row: dict[str, Any]) -> None:
    """A token takes two for each weight it is multiplied with: of the teacher once; of the student three times, and no
    fourth time where a forward is computed again to save memory: PaLM's MFU counts none of it (arXiv:2204.02311)."""
    body, attention = P - 2 * HEAD, 4 * 4096 * 4096  # of a layer's attention, forward
    student = 6 * body + 6 * HEAD + 4 * 3.5 * attention  # its backward takes 2.5 times that
    assert row["flops_per_token"] == pytest.approx(student + 2 * (T - HEAD) + 32 * attention, rel=1e-3)


def test_a_node_holds_what_its_ranks_hold(row: dict[str, Any]) -> None:
    """Each reads its share of the start in fp32 and of the teacher in bf16; four of them are on a node here."""
    assert row["host_bytes"] == pytest.approx((4 * P + 2 * T) / 64, rel=1e-6)
    assert row["node_host_bytes"] == 4 * row["host_bytes"]


def test_weights_that_go_straight_to_a_gpu_take_no_host_memory_and_a_checkpoint_does(tmp_path: Path) -> None:
    words = [f"teacher.path={folder(tmp_path, TINY)}", "student.keep=2", "data.max_length=512", "strategy=ddp", *A100]
    rows = forecast(tmp_path, "+experiment=distill_7b_to_1b", *words)
    size = rows["distill"]["parameters"]
    assert rows["distill"]["host_bytes"] == math.ceil(12 * size / 64)
    assert rows["qat"]["host_bytes"] == math.ceil(12 * rows["qat"]["parameters"] / 64)


def test_weights_are_read_in_fp32_where_adapters_alone_are_trained(tmp_path: Path) -> None:
    """27 GB of the student's, and 13.5 GB of a teacher in bf16, are there before DeepSpeed halves the student."""
    base = folder(tmp_path, LLAMA_2_7B)
    words = ["+experiment=distill_7b_to_1b", "only=[recover]", f"stages.recover.student.path={base}", *A100]
    words += [f"teacher.path={base}", f"model.path={base}", "strategy=zero2", "lora=lora", "data.max_length=512"]
    row = forecast(tmp_path, *words, "forecast.gpu=a100-40gb")["recover"]
    assert row["reading_bytes"] == 4 * T + row["teacher_bytes"]
    assert row["device_bytes"] < row["usable_bytes"] < row["reading_bytes"]
    assert not row["fits"]
    assert ", while weights are read in fp32; what fits: " in str(row["notes"]), row["notes"]


@pytest.mark.parametrize(("strategy", "refused"), [("ddp", False), ("zero3", True)])
def test_what_is_packed_is_read_by_way_of_the_host_and_never_sharded(
    strategy: str, refused: bool, tmp_path: Path
) -> None:
    base = folder(tmp_path, TINY)
    words = ["+experiment=distill_7b_to_1b", "only=[recover]", f"stages.recover.student.path={base}", *A100]
    words += [f"teacher.path={base}", f"model.path={base}", "lora=qlora", "data.max_length=512"]
    row = forecast(tmp_path, *words, f"strategy={strategy}")["recover"]
    assert row["reading_bytes"] == 0
    assert ("packed weights are not sharded, and the command would be refused" in str(row["notes"])) == refused
    if not refused:
        assert row["host_bytes"] == 4 * row["parameters"]


def test_time_is_operations_by_the_rate_that_is_assumed(row: dict[str, Any]) -> None:
    assert row["tokens_per_second"] == pytest.approx(64 * 0.5 * 312e12 / row["flops_per_token"])
    assert row["seconds"] == pytest.approx(1e10 / row["tokens_per_second"])
    assert row["gpu_hours"] == pytest.approx(64 * row["seconds"] / 3600)


def test_a_batch_that_cannot_be_divided_is_told(tmp_path: Path) -> None:
    words = [f"teacher.path={folder(tmp_path, TINY)}", "only=[distill]", "data.max_length=512", "student.keep=2"]
    row = forecast(tmp_path, "+experiment=distill_7b_to_1b", *words, "forecast.show=true", "forecast.gpus=512")[
        "distill"
    ]
    assert not any("runs one process" in note for note in row["notes"])
    assert any("set stages.distill.training.global_batch to a multiple of 1024" in note for note in row["notes"])


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_forecast_from_a_config_alone(experiment: str, tmp_path: Path) -> None:
    there = folder(tmp_path, TINY)
    given = [word.replace("some/folder", str(there)) for word in GIVEN.get(experiment, [])]
    if experiment == "distill_7b_to_1b":
        given += [f"teacher.path={there}", "student.keep=2"]
    rows = forecast(tmp_path, f"+experiment={experiment}", *given, "forecast.show=true", "forecast.gpus=8")
    for row in rows.values():
        assert not any("cannot be traced" in note for note in row["notes"]), row
    assert any("device_bytes" in row for row in rows.values())


def test_the_command_line_shows_a_table_and_starts_nothing(tmp_path: Path) -> None:
    words = ["+experiment=quantize_only", f"model.path={folder(tmp_path, TINY)}", "data.train=no/such/file.jsonl"]
    done = train(*words, f"run_dir={tmp_path / 'run'}", "forecast=true", "forecast.gpu=h200")
    assert done.returncode == 0, done.stderr
    for told in ("forecast for 1 × h200", "memory of a GPU", "tokens/s", "nothing was started"):
        assert told in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["forecast.show=true", "forecast.gpu=h10"], "forecast.gpu=h10: unknown; did you mean h100?"),
        (["forecast.show=true", "forecast.efficiency=40"], "forecast.efficiency=40.0: need a share in (0, 1]"),
        (["forecast.show=true", "forecast.gpus=0"], "forecast.gpus=0: need at least 1"),
        (["forecast.gpus=8"], "forecast.gpus=8: it says where a forecast is of; add forecast=true"),
    ],
)
def test_what_is_no_place_is_refused(words: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=re.escape(told)):
        forecast(tmp_path, "+experiment=quickstart", "only=[pretrain]", *words)


def test_whether_it_pays_follows_the_paper() -> None:
    """arXiv:2502.08606: not where one student's teacher has to be trained for it; else while the student lacks data."""
    words: dict[str, Any] = {"student": 10**9, "fresh": True, "cost": 3.0}
    assert "unlikely to pay" in verdict(tokens=10**10, made_here=True, **words)
    assert "likely to pay" in verdict(tokens=10**10, made_here=False, **words)
    assert "may not pay" in verdict(tokens=10**12, made_here=False, **words)
    assert "30.0 G tokens for the same compute" in verdict(tokens=10**10, made_here=False, **words)
