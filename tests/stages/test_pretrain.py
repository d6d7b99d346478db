"""What pretrain leaves in its work folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.building import build
from pipeline.context import Context
from pipeline.data.prepared import prepared
from pipeline.training.prepare import Prepared
from tests.command import SMALL
from tests.staged import composed


def _prepared(context: Context) -> list[Any]:
    build(context.config, context.stage).prepare(context)
    sequences, _ = prepared(Path(Prepared.read(context.work).train))
    return [row["input_ids"] for row in sequences]


def test_a_tokenizer_that_was_changed_is_told_and_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else a run that was killed goes on with other text than it began with."""
    context = Context(composed(tmp_path / "run", "+experiment=quickstart", *SMALL), "pretrain")
    before = _prepared(context)
    file = context.work / "tokenizer" / "tokenizer.json"
    whole = file.read_bytes()
    capsys.readouterr()
    assert _prepared(context) == before
    assert capsys.readouterr().out == ""
    rules = json.loads(whole)
    rules["model"]["merges"] = rules["model"]["merges"][:-9]
    file.write_text(json.dumps(rules))
    assert _prepared(context) == before
    (told,) = capsys.readouterr().out.splitlines()
    assert "tokenizer was changed since it was trained" in told
    assert file.read_bytes() == whole
