"""The stage quantize on a model of a few thousand parameters, which takes a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.pruning.families import model_of
from tests.staged import Experiment

LITTLE = [
    "data=stdlib",
    "data.max_documents=60",
    "data.max_length=48",
    "stages.quantize.calibration.samples=12",
    "stages.quantize.calibration.length=32",
    "scheme.weights.group_size=16",
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


def teacher_in(run_dir: Path) -> Path:
    return Experiment("demo/prune_recover", PRETRAIN).make(run_dir, "pretrain")


def folder_of(family: str, teacher: Path, tmp_path: Path, **values: Any) -> Path:
    """Random weights of a family, with the teacher's tokenizer."""
    folder = tmp_path / family
    model_of(family, dtype=torch.float32, vocab_size=300, **values).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((teacher / name).read_bytes())
    return folder


def without_a_way_to_the_last(teacher: Path, tmp_path: Path) -> Path:
    """A mixture whose last expert is never chosen: each token goes to one, and its logit is the others' mean."""
    folder = folder_of("mixtral", teacher, tmp_path, num_experts_per_tok=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[-1] = layer.mlp.gate.weight[:-1].mean(0)
    model.save_pretrained(folder)
    return folder


def activations(scheme: str) -> list[str]:
    """Those of a scheme of 8 bits, with weights of 4 bits in groups."""
    return [f"scheme={scheme}", "scheme.weights.bits=4", "scheme.weights.granularity=group"]
