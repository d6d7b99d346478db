"""The command line as a user types it, in a process of its own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# The quickstart up to its comparison, at a size of seconds.
SMALL = [
    "order=[pretrain,record,distill,control,evaluate]",
    *(f"~stages.{name}" for name in ("prune", "recover", "quantize", "qat", "unquantized", "export")),
    "data.max_documents=60",
    "data.max_length=64",
    "stages.pretrain.tokenizer.vocab_size=400",
    "stages.pretrain.model.hidden_size=48",
    "stages.pretrain.model.intermediate_size=96",
    "stages.pretrain.model.num_hidden_layers=2",
    "stages.pretrain.model.num_attention_heads=4",
    "stages.pretrain.model.num_key_value_heads=2",
    "+stages.pretrain.model.attention_dropout=0.1",
    "stages.pretrain.training.max_steps=12",
    "stages.pretrain.training.validate_every_steps=6",
    "student.shape.hidden_size=32",
    "student.shape.intermediate_size=64",
    "student.shape.num_hidden_layers=1",
    "student.shape.num_attention_heads=2",
    "student.shape.num_key_value_heads=2",
    "stages.distill.training.max_steps=12",
    "stages.distill.training.validate_every_steps=6",
    "stages.distill.training.micro_batch=4",
    "trainer.checkpoint.every_steps=4",
    "trainer.log_every_steps=2",
    "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 16, new_tokens: 8, repeats: 1}",
]


# One thread each: the models are tiny, and tests must not depend on who else uses the machine's cores.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def train(
    *words: str,
    path: str = "",
    timeout: float = 300,
    limit: int | None = None,
    traceback: bool = False,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """`python train.py WORDS`, preloaded where nothing is asked of its imports.

    `path` goes in front of the import path, `limit` is what a file may have in bytes. `traceback`: whether it may print
    one, as where a test breaks what no person can mend.
    """
    env = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path, **environment}
    if not path and limit is None and not environment.keys() - {"COLUMNS"}:
        from tests.preloaded import run

        done = run(words, env, timeout)
    else:
        command = [sys.executable, str(ROOT / "train.py"), *words]
        if limit is not None:
            command = ["prlimit", f"--fsize={limit}", *command]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert traceback or "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr  # in all tests
    return done


def start(*words: str, log: Path | None = None, **environment: str) -> subprocess.Popen[str]:
    """Begun, and not waited for; what it says goes to the file `log`."""
    env = {**os.environ, **ENVIRONMENT, **environment}
    with open(log or os.devnull, "w") as said:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *words], env=env, text=True, stdout=said, stderr=said
        )


def front_door() -> Any:
    """train.py as a module."""
    spec = importlib.util.spec_from_file_location("front_door", ROOT / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(folder: Path) -> dict[str, object]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def unclocked(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl without what a clock decides, or the machine."""
    clocked = ("seconds", "tokens_per_second", "tflops_per_rank", "mfu", "memory_gb")
    return {name: value for name, value in line.items() if not name.startswith(clocked)}
