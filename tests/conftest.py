"""Shapes are checked while tests run; the environment is that of a CPU rank."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch
from jaxtyping import install_import_hook

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

torch.set_num_threads(1)  # tiny models; and tests must not depend on who else uses the machine's cores
install_import_hook(
    [
        "models.objectives",
        "models.heads",
        "models.teachers",
        "models.teachers.encodings",
        "models.representations",
        "models.generation",
    ],
    "beartype.beartype",
)

# The same examples in every run, and no clock: a test that fails can be run again, on a machine that is busy, too.
hypothesis.settings.register_profile("retort", derandomize=True, deadline=None, max_examples=30, print_blob=False)
hypothesis.settings.load_profile("retort")

_LONG = (
    "test_run.py",
    "test_record.py",
    "test_other_tokenizer.py",
    "test_on_policy.py",
    "test_training.py",
    "test_qat.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes begin first, or one process would be left alone with them at the end."""
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
