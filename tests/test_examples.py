"""examples/: the scripts that a reader copies, run as they stand, on a model of a few thousand weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.tokenizer import train_tokenizer
from tests.command import ENVIRONMENT, ROOT
from tests.test_docs import TOPICS, save_little

SPEED = "{_target_: models.measure.Speed, prompt_tokens: 8, new_tokens: 4, repeats: 1}"
SHORT = ["trainer.accelerator=cpu", "data.max_length=64", f"stages.evaluate.speed={SPEED}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: a model, a text, and nothing else."""
    folder = tmp_path_factory.mktemp("reader")
    tokenizer = train_tokenizer(TOPICS, 400, folder / "tokenizer")
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    save_little(folder / "model", tokenizer, seed=0)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TOPICS[:60]))
    return folder


def run(folder: Path, script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *words],
        cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def opened(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
def test_a_student_is_distilled_on_conversations(folder: Path) -> None:
    template = ROOT / "examples" / "chat.jinja"
    words = ["student.keep=1", f"data.chat_template={template}", "stages.distill.training.max_steps=3", *SHORT]
    run(folder, "distil_chat.py", "model", "chat.jsonl", *words)
    assert opened(folder / "runs" / "chat" / "distill").config.num_hidden_layers == 1
    assert "distill" in (folder / "runs" / "chat" / "report.md").read_text()


@pytest.mark.slow  # two runs, and two runtimes
def test_a_model_is_pruned_recovered_exported_and_talked_to(folder: Path) -> None:
    words = ["stages.prune.multiple_of=32", "stages.prune.protect_first=0", "stages.prune.protect_last=0"]
    words += ["stages.recover.training.max_steps=3", "stages.recover.training.global_batch=4", *SHORT]
    said = run(folder, "prune_recover_export.py", "model", "text.jsonl", *words)
    export = folder / "runs" / "small-export" / "export"
    assert f"{export.relative_to(folder)}/gguf: " in said
    assert opened(export / "huggingface").num_parameters() < opened(folder / "model").num_parameters()
    for answering in (export / "huggingface", export / "gguf"):
        assert run(folder, "serve_and_chat.py", str(answering), "The name of a module")
