"""The production experiment itself, at sizes for two CPU ranks: ZeRO-3, bf16, activation checkpointing, W&B offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import train

pytestmark = pytest.mark.slow  # the whole chain on two ranks takes minutes


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flagship") / "run"
    done = train("+experiment=distill_7b_to_1b", "+scale=tiny", f"run_dir={folder}", timeout=550)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "2 × cpu" in done.stdout
    return folder


def test_it_runs_on_two_ranks_under_zero3_and_opens_plainly(run_dir: Path, tmp_path: Path) -> None:
    code = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 4
assert all(p.numel() and torch.isfinite(p).all() for p in model.parameters())
print(model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False).shape)
"""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir / "distill")], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_report_has_every_model_and_export(run_dir: Path) -> None:
    rows = json.loads((run_dir / "report.json").read_text())["rows"]
    models = ["pretrain", "distill", "prune", "recover", "quantize", "qat"]
    exports = ["export/huggingface", "export/compressed_tensors", "export/gguf"]
    assert [row["stage"] for row in rows] == models + exports
    assert rows[3]["parameters"] < rows[1]["parameters"] < rows[0]["parameters"]
    assert all(row["perplexity"] < 512 for row in rows)  # better than knowing nothing of 512 tokens


def test_every_export_is_the_quantized_model_that_was_trained(run_dir: Path) -> None:
    told = json.loads((run_dir / "export" / "manifest.json").read_text())["certificates"]
    assert list(told) == ["huggingface", "compressed_tensors", "gguf"]
    for name, certificate in told.items():
        assert certificate["weights_bit_equal"] is True, name
        assert certificate["kl"] < 1e-4, name
        own = json.loads((run_dir / "export" / name / "manifest.json").read_text())["certificates"]
        assert own["perplexity_reloaded"] == pytest.approx(own["perplexity_before"], rel=1e-3)
        assert (run_dir / "export" / name / "README.md").read_text().count("vllm serve") == (name != "gguf")
    assert told["gguf"]["runtime"] == "llama.cpp"


def test_the_student_learnt(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "distill" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


def test_tracking_went_offline_by_itself(run_dir: Path) -> None:
    for stage in ("pretrain", "distill", "recover", "qat"):
        assert list((run_dir / "logs" / stage).rglob("*.wandb")), stage
