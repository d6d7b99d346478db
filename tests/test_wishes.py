"""What people come for, in at most eight words each, run on a model of a few thousand weights.

The words are what a person types; SMALL makes the same run small. No word has an `@` or braces, and `+` stands before
`experiment` alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.data.tokenizer import train_tokenizer
from tests.command import ROOT, train
from tests.teachers.test_endpoint import Served
from tests.test_docs import TOPICS, save_little
from tests.test_wandb import history_of, records_of

CHATS = [
    {"messages": [{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:160] or "yes"}]}
    for text in TOPICS[-60:]
]
SPEED = [f"stages.evaluate.speed.{key}={value}" for key, value in (("prompt_tokens", 8), ("new_tokens", 4))]
SMALL = ["trainer.accelerator=cpu", "trainer.precision=32-true", "data.max_length=64", "data.max_documents=60"]
TINY_TRAINING = ["max_steps=2", "global_batch=4", "micro_batch=2"]

LAYERS = ["+experiment=distill", "teacher.path={model}", "student=layers", "student.keep=1", "data=chat",
          "data.train={chats}", "strategy=zero2", "logger=wandb"]  # fmt: skip
BUDGET = ["+experiment=prune_recover", "model.path={model}", "data.train={text}", "stages.prune.target_parameters=70K"]
GPTQ = ["+experiment=quantize_export", "model.path={model}", "data.train={text}", "quantizer=gptq",
        "format=[compressed_tensors]"]  # fmt: skip
GGUF = ["+experiment=export_only", "model.path={wide}", "format=gguf", "formats.gguf.type=q4_k_m"]
SERVED = ["+experiment=distill", "teacher=served", "teacher.endpoint.url={url}", "teacher.path={model}",
          "data.train={text}", "divergence.temperature=1", "student.shape.num_hidden_layers=1"]  # fmt: skip
ONE_GPU = ["+experiment=distill", "teacher.path={model}", "data.train={text}", "student=layers", "student.keep=1",
           "strategy=zero2", "trainer.devices=1"]  # fmt: skip
TWO_GPUS = [*ONE_GPU[:-1], "trainer.devices=2"]
KILLED_AT_STEP_4 = {"path": str(ROOT / "tests" / "killing"), "RETORT_TEST_KILL": "os.rename step-00000004 1"}


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("wishes")
    tokenizer = train_tokenizer(TOPICS, 400, folder / "tokenizer")
    tokenizer.chat_template = (ROOT / "examples" / "chat.jinja").read_text()
    save_little(folder / "model", tokenizer, seed=0)
    save_little(folder / "wide", tokenizer, seed=0, width=256)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS[:60]))
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    return {name: str(folder / file) for name, file in
            (("model", "model"), ("wide", "wide"), ("text", "text.jsonl"), ("chats", "chats.jsonl"))}  # fmt: skip


def typed(wish: list[str], things: dict[str, str]) -> list[str]:
    """The words of a wish, which are few and plain."""
    assert len(wish) <= 8
    assert not any(mark in word for word in wish for mark in "@{}" if word.format(**things) == word)
    assert [word for word in wish if word.startswith("+")] == [wish[0]]
    return [word.format(**things) for word in wish]


def granted(wish: list[str], things: dict[str, str], run_dir: Path, *small: str) -> Path:
    done = train(*typed(wish, things), f"run_dir={run_dir}", *SMALL, *small, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return run_dir


def short(*stages: str) -> list[str]:
    return [f"stages.{stage}.training.{word}" for stage in stages for word in TINY_TRAINING]


def config_of(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "config.json").read_text())
    return found


def test_a_student_of_some_layers_on_chat_data_under_zero2_with_wandb(things: dict[str, str], tmp_path: Path) -> None:
    more = ["trainer.devices=2", *short("distill"), "only=[distill]"]  # of GPUs all are taken without saying so
    run = granted(LAYERS, things, tmp_path / "run", *more)
    assert config_of(run / "distill")["num_hidden_layers"] == 1
    said = {
        stage: records_of(next((run / "logs" / stage / "wandb").glob("offline-*"))) for stage in ("distill", "report")
    }
    started = [next(record["run"] for record in records if record["type"] == "run") for records in said.values()]
    assert [(each["run_group"], each["job_type"]) for each in started] == [
        ("distill-run", "distill"), ("distill-run", "report"),
    ]  # fmt: skip
    row = history_of(said["distill"])[0]
    assert {"loss", "cross_entropy", "forward_kl", "teacher_gap", "top1_agreement", "grad_norm", "tokens_per_second",
            "tflops_per_rank", "memory_gb/rank_0", "memory_gb/rank_1"} <= row.keys()  # fmt: skip
    artifacts = [record["artifact"] for record in said["distill"] if record["type"] == "artifact"]
    assert {(each["type"], each.get("use_after_commit", False)) for each in artifacts} == {
        ("dataset", True), ("model", True), ("model", False),
    }  # fmt: skip
    assert "distill/parameters" in history_of(said["report"])[0]


@pytest.mark.slow
def test_a_model_within_a_budget_of_parameters(things: dict[str, str], tmp_path: Path) -> None:
    small = ["stages.prune.multiple_of=1", "stages.prune.protect_first=0", "stages.prune.protect_last=0"]
    run = granted(BUDGET, things, tmp_path / "run", *small, *short("recover"), *SPEED)
    sizes = json.loads((run / "prune" / "plan.json").read_text())
    assert sizes["after"]["parameters"] <= 70_000 < sizes["before"]["parameters"]
    assert {row["stage"] for row in json.loads((run / "report.json").read_text())["rows"]} == {
        "teacher", "prune", "recover",
    }  # fmt: skip


@pytest.mark.slow
def test_four_bits_by_gptq_for_vllm(things: dict[str, str], tmp_path: Path) -> None:
    small = ["scheme.weights.group_size=32", "stages.quantize.calibration.samples=4"]
    small += ["stages.quantize.calibration.length=32", *SPEED]
    run = granted(GPTQ, things, tmp_path / "run", *small)
    said = config_of(run / "export" / "compressed_tensors")["quantization_config"]
    assert isinstance(said, dict)
    assert said["quant_method"] == "compressed-tensors"


@pytest.mark.slow
def test_a_folder_as_q4_k_m(things: dict[str, str], tmp_path: Path) -> None:
    run = granted(GGUF, things, tmp_path / "run")
    assert list((run / "export" / "gguf").glob("*.gguf"))


@pytest.fixture
def server(things: dict[str, str]) -> Iterator[Served]:
    served = Served(Path(things["model"]), "--max-logprobs", "64")
    yield served
    served.kill()


@pytest.mark.slow
def test_a_teacher_that_a_server_runs(things: dict[str, str], server: Served, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{server.port}/v1"
    small = [*short("distill"), "data.max_documents=12", "only=[record,distill]"]
    run = granted(SERVED, {**things, "url": url}, tmp_path / "run", *small)
    assert config_of(run / "distill")["num_hidden_layers"] == 1
    record = json.loads((run / "record" / "manifest.json").read_text())
    assert record["kind"] == "signal"
    assert record["metrics"]["server"]["dtype"] == "float32"


@pytest.mark.slow
def test_a_run_goes_on_with_other_devices(things: dict[str, str], tmp_path: Path) -> None:
    """Stopped after two of four steps on one rank, it goes on with two: the same line, another number."""
    steps = ["trainer.checkpoint.every_steps=2", *short("distill")[1:], "only=[distill]", "optimizer.lr=1e-2"]
    small = [*steps, "stages.distill.training.epochs=null", "stages.distill.training.max_steps=4"]
    run = tmp_path / "run"
    killed = train(*typed(ONE_GPU, things), f"run_dir={run}", *SMALL, *small, **KILLED_AT_STEP_4)
    assert killed.returncode != 0
    assert list((run / "work" / "distill" / "checkpoints").glob("step-*"))
    granted(TWO_GPUS, things, run, *small)
    assert json.loads((run / "distill" / "manifest.json").read_text())["steps"] == 4
