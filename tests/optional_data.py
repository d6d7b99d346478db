"""Real text and small pretrained models, which are no part of the project. Tests that read them are skipped without.

RETORT_TEST_DATA names the folder. A test that is skipped says which file it misses.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.command import ROOT

FOLDER = Path(os.environ.get("RETORT_TEST_DATA") or ROOT.parent / "shared")
STORIES = FOLDER / "models" / "stories260K"
STORIES_TEXT = FOLDER / "data" / "tinystories" / "train.jsonl"


def needed(path: Path) -> Path:
    """The path, or the test is skipped."""
    if not path.exists():
        pytest.skip(f"{path} is not there; RETORT_TEST_DATA=FOLDER names another folder of test data")
    return path
