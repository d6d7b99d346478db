"""What `forecast=true` says of memory, against runs whose every allocation is counted by the C library."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.command import ROOT, train
from tests.forecast.measuring import COMPILER, compiled

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")]

_OTHERS = ("record", "control", "prune", "recover", "quantize", "qat", "unquantized", "export", "evaluate")
_WIDTHS = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
_TRAINING = {"max_steps": 4, "global_batch": 16, "micro_batch": 4}
_WORDS = [
    "order=[pretrain,distill]",
    *(f"~stages.{name}" for name in _OTHERS),
    "data.max_documents=300",
    "data.max_length=256",
    "stages.pretrain.tokenizer.vocab_size=4096",
    *(f"stages.pretrain.model.{name}={value}" for name, value in _WIDTHS.items()),
    *(f"student.shape.{name}={value}" for name, value in _WIDTHS.items()),
    "student.shape.num_attention_heads=4",
    *(
        f"stages.{stage}.training.{name}={value}"
        for stage in ("pretrain", "distill")
        for name, value in _TRAINING.items()
    ),
    "trainer.accelerator=cpu",
    "trainer.checkpoint.every_steps=1000",
    "callbacks.watchdog=null",
    "logger=none",
]
# Buckets as small as the models are, or they would be most of what is held.
_BUCKET = "strategy.config.reduce_bucket_size=2000000"
_OF_STRATEGY = {
    "single": [],
    "ddp": [],
    "zero1": [f"+{_BUCKET}"],
    "zero2": [f"+{_BUCKET}"],
    "zero3": [
        f"+{_BUCKET}",
        "+strategy.config.stage3_param_persistence_threshold=0",
        "+strategy.config.stage3_max_reuse_distance=0",
        "+strategy.config.stage3_prefetch_bucket_size=0",
    ],
}


@pytest.mark.parametrize(
    ("strategy", "checkpointing"),
    [*((strategy, False) for strategy in _OF_STRATEGY), ("single", True), ("zero3", True)],
)
def test_memory_is_forecast_within_a_tenth_of_what_is_measured(
    strategy: str, checkpointing: bool, tmp_path: Path
) -> None:
    ranks = 1 if strategy == "single" else 2
    words = [
        *_WORDS,
        f"run_dir={tmp_path / 'run'}",
        f"strategy={strategy}",
        f"trainer.devices={ranks}",
        *_OF_STRATEGY[strategy],
        *(f"stages.{stage}.training.activation_checkpointing={checkpointing}" for stage in ("pretrain", "distill")),
    ]
    told = train(*words, "forecast=true", "forecast.json=true", "forecast.gpu=cpu", timeout=500)
    assert told.returncode == 0, told.stdout + told.stderr
    forecast = {row["stage"]: row["device_bytes"] for row in json.loads(told.stdout)["stages"]}

    callback = f"{{_target_: tests.forecast.measuring.PeakMemory, out: {tmp_path / 'peak'}, first: {8 // ranks}}}"
    library = compiled(tmp_path)
    done = train(*words, f"+callbacks.measuring={callback}", path=str(ROOT), timeout=550, LD_PRELOAD=str(library))
    assert done.returncode == 0, done.stdout + done.stderr

    def measured(stage: str) -> Any:
        return max(json.loads((tmp_path / f"peak-{stage}-{rank}.json").read_text()) for rank in range(ranks))

    found = {stage: measured(stage) for stage in forecast}
    print({stage: (forecast[stage] / 1e6, found[stage] / 1e6) for stage in found}, os.linesep)
    assert found == {stage: pytest.approx(size, rel=0.1) for stage, size in forecast.items()}
