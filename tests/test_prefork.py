"""The process that stages are forked from: used without a GPU alone, and as good as a new process."""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import prefork
from pipeline.launch import environment

AUTO: dict[str, Any] = {"trainer": {"accelerator": "auto"}, "stages": {}}
CPU: dict[str, Any] = {"trainer": {"accelerator": "cpu"}, "stages": {}}


LEAST: dict[str, Any] = {
    **{"stages": {}, "order": [], "run_dir": "r", "model": None, "dry_run": True, "show_data": 0},
    "launch": {"_target_": "pipeline.launch.Local"},
    "forecast": {"show": False},
    **dict.fromkeys(("prepare_only", "prepare_data", "share")),
}


@pytest.fixture
def server() -> Iterator[prefork.Server]:
    with prefork.server(CPU, []) as started:
        assert started is not None
        yield started


def run(server: prefork.Server, spec: Path, **changed: str | None) -> tuple[int, str, str]:
    """Exit status, output and errors of a check."""
    env = {**environment(1, "cpu"), **{name: value for name, value in changed.items() if value is not None}}
    for name in [name for name, value in changed.items() if value is None]:
        env.pop(name, None)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = server.run(["check", str(spec)], env, [out.fileno(), err.fileno()], output=True)
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


def test_where_there_may_be_a_gpu_nothing_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefork, "_GPUS", ("null",))  # /dev/null is there, as a GPU's node would be
    with prefork.server(AUTO, []) as started:
        assert started is None
    with prefork.server(CPU, []) as started:
        assert started is not None


def test_a_child_ends_with_its_own_status_and_the_next_one_is_none_the_worse(
    server: prefork.Server, tmp_path: Path
) -> None:
    code, _, errors = run(server, tmp_path / "nowhere")
    assert code == 1
    assert "FileNotFoundError" in errors
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"config": LEAST, "stages": []}))
    code, said, _ = run(server, spec)
    assert (code, json.loads(said)) == (2, {"refusal": "there is no stage to run"})


def test_a_child_has_the_environment_that_it_is_given_however_large_that_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tells.py").write_text(
        'import os\nraise ImportError(f\'mark {os.environ.get("MARK")}, home {os.environ.get("HOME")}\')\n'
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for name in ("ONE", "OTHER"):
        monkeypatch.setenv(name, "x" * 120_000)  # together more than a message holds
    spec = tmp_path / "spec.json"
    config = {**LEAST, "stages": {"a": {"_target_": "tells.Tells"}}, "order": ["a"]}
    spec.write_text(json.dumps({"config": config, "stages": ["a"]}))
    with prefork.server(CPU, []) as started:
        assert started is not None
        code, said, errors = run(started, spec, MARK="7", HOME=None)
    assert code == 2, errors
    assert "mark 7, home None" in said


def test_a_server_that_is_killed_is_told_as_a_killed_stage(server: prefork.Server, tmp_path: Path) -> None:
    os.kill(server._process.pid, signal.SIGKILL)
    assert run(server, tmp_path / "nowhere")[0] == -signal.SIGKILL


def test_only_modules_that_a_stage_names_are_imported_before() -> None:
    node = {"_target_": "a.b.C", "x": [{"_target_": "d.E"}], "y": {"z": {"_target_": "f.g.H"}, "w": 1}}
    assert sorted(prefork._modules(node)) == ["a.b", "d", "f.g"]
