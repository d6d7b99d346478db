"""A folder under its final name is whole, whatever happened while it was made."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifact, hashes, verdicts
from pipeline.data.documents import Documents
from tests.command import ROOT

RESUME = {"mode": "continue", "from_step": None, "skip_sequences": []}
HEAD = {"stage": "distill", "kind": "model", "parents": {}, "config": {}}


def _build(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "sub").mkdir()
    (folder / "sub" / "config.json").write_text("{}")


def test_hashes_are_told_where_none_can_be_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that is read-only, where a finished run is looked at."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    os.utime(tmp_path / "a" / "one", (0, 0))
    monkeypatch.setattr(artifact, "_SETTLED_NS", -(10**12))

    def refused(path: Path, value: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(artifact, "write_json", refused)
    cache = tmp_path / "work" / "hashes.json"
    assert artifact.content_hash(tmp_path / "a", cache) == artifact.content_hash(tmp_path / "a")


def test_a_published_folder_says_what_is_in_it(tmp_path: Path) -> None:
    manifest = artifact.publish(tmp_path / "distill", _build, HEAD)
    assert artifact.read_manifest(tmp_path / "distill") == manifest
    assert set(manifest["files"]) == {"model.safetensors", "sub/config.json"}
    assert manifest["content_hash"] == artifact.content_hash(tmp_path / "distill")
    # independent truth: sha256sum's own figure
    told = subprocess.run(["sha256sum", tmp_path / "distill" / "model.safetensors"], capture_output=True, text=True)
    assert manifest["files"]["model.safetensors"]["sha256"] == told.stdout.split()[0]


def test_a_build_that_fails_leaves_the_old_artifact_alone(tmp_path: Path) -> None:
    artifact.publish(tmp_path / "distill", _build, HEAD)

    def broken(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        artifact.publish(tmp_path / "distill", broken, HEAD)
    assert (tmp_path / "distill" / "model.safetensors").read_bytes() == b"weights"


def test_the_hash_follows_contents_and_names_and_not_the_clock(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a").write_text("1")
    os.utime(other / "a", (0, 0))
    assert artifact.content_hash(one) == artifact.content_hash(other)
    (other / "a").write_text("2")
    assert artifact.content_hash(one) != artifact.content_hash(other)
    (other / "a").rename(other / "b")
    (other / "b").write_text("1")
    assert artifact.content_hash(one) != artifact.content_hash(other)


def test_a_remembered_hash_is_taken_again_when_the_file_changes(tmp_path: Path) -> None:
    folder, cache = tmp_path / "model", tmp_path / "hashes.json"
    folder.mkdir()
    (folder / "a").write_text("1")
    before = artifact.content_hash(folder, cache)
    assert artifact.content_hash(folder, cache) == before
    (folder / "a").write_text("2")
    assert artifact.content_hash(folder, cache) == artifact.content_hash(folder) != before


def test_the_metrics_of_a_training_are_beside_the_model_and_not_of_it(tmp_path: Path) -> None:
    def build(speed: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            (folder / "model.safetensors").write_bytes(b"weights")
            (folder / "metrics.jsonl").write_text(speed)

        return write

    one, other = (artifact.publish(tmp_path / name, build(name), HEAD) for name in ("slow", "fast"))
    assert one["content_hash"] == other["content_hash"] == artifact.content_hash(tmp_path / "slow")
    assert one["files"]["metrics.jsonl"] != other["files"]["metrics.jsonl"]
    file = tmp_path / "metrics.jsonl"  # as somebody's data it is as good as any name
    file.write_text("a")
    before = artifact.content_hash(file)
    file.write_text("b")
    assert artifact.content_hash(file) != before


def test_a_folder_with_a_file_cut_short_is_damaged(tmp_path: Path) -> None:
    artifact.publish(tmp_path / "distill", _build, HEAD)
    (tmp_path / "distill" / "model.safetensors").write_bytes(b"w")
    assert artifact.read_manifest(tmp_path / "distill") is None
    assert artifact.look(tmp_path / "distill").problem == "model.safetensors has 1 bytes instead of 7"


OPERATIONS = range(1, 9)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_killed_at_any_rename_or_write_the_folder_is_old_or_new_and_never_half(tmp_path: Path, operation: int) -> None:
    artifact.publish(tmp_path / "distill", _build, HEAD)
    code = """
import os, signal, sys
from pathlib import Path
from pipeline import artifact
left = [int(sys.argv[2])]
def hook(event, arguments):
    if event in ("os.rename", "shutil.rmtree") or (event == "open" and ".partial" in str(arguments[0])):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
def build(folder):
    (folder / "model.safetensors").write_bytes(b"new weights")
sys.addaudithook(hook)
head = {"stage": "distill", "kind": "model", "parents": {}, "config": {}}
artifact.publish(Path(sys.argv[1]) / "distill", build, head)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(operation)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    artifact.sweep(tmp_path, ["distill"])
    manifest = artifact.read_manifest(tmp_path / "distill")
    assert manifest is not None
    content = (tmp_path / "distill" / "model.safetensors").read_bytes()
    assert content in (b"weights", b"new weights")
    assert manifest["content_hash"] == artifact.content_hash(tmp_path / "distill")
    assert [p.name for p in tmp_path.iterdir()] == ["distill"]
    if operation == OPERATIONS[0]:
        assert done.returncode == -9, "the first operation must be met, or this test shows nothing"


def test_json_is_written_aside_and_never_in_place(tmp_path: Path) -> None:
    """Whoever has the old file open reads the old file to its end."""
    artifact.write_json(tmp_path / "a.json", {"a": 1})
    os.link(tmp_path / "a.json", tmp_path / "old.json")
    artifact.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "old.json").read_text()) == {"a": 1}
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}


@pytest.mark.parametrize("make", [Path.symlink_to, os.link], ids=["a link", "a second name"])
def test_what_lies_where_a_file_is_written_aside_is_not_followed(tmp_path: Path, make: Any) -> None:
    (tmp_path / "thesis").write_text("mine")
    make(*((tmp_path / ".x.json.partial", tmp_path / "thesis")[:: 1 if make is Path.symlink_to else -1]))
    artifact.write_json(tmp_path / "x.json", [1])
    assert (tmp_path / "thesis").read_text() == "mine"
    assert not (tmp_path / "x.json").is_symlink()
    assert json.loads((tmp_path / "x.json").read_text()) == [1]
    assert {path.name for path in tmp_path.iterdir()} == {"thesis", "x.json"}


def test_json_is_written_where_a_fifo_lies(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".x.json.partial")
    os.mkfifo(tmp_path / "x.json")
    artifact.write_json(tmp_path / "x.json", [1])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


def test_a_folder_is_not_built_in_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / ".distill.partial").symlink_to(tmp_path / "mine")
    artifact.publish(tmp_path / "distill", _build, HEAD)
    assert not list((tmp_path / "mine").iterdir())
    assert artifact.look(tmp_path / "distill").state == "complete"


def test_json_is_replaced_whole(tmp_path: Path) -> None:
    artifact.write_json(tmp_path / "a.json", {"a": 1})
    artifact.write_json(tmp_path / "a.json", {"a": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("attempt", "verdict"), [("one", "skip"), ("two", "resume")])
def test_killed_between_two_stages_the_finished_one_is_skipped(tmp_path: Path, attempt: str, verdict: str) -> None:
    """Its result is in place and its work folder not yet removed; a later attempt, by force, goes on instead."""
    settings = {"max_steps": 4}
    artifact.publish(tmp_path / "distill", _build, {**HEAD, "config": settings, "attempt": "one"})
    work = tmp_path / "work" / "distill"
    (work / "checkpoints" / "step-00000004").mkdir(parents=True)
    artifact.write_json(work / "stage.json", {"attempt": attempt, "identity": settings, "parents": {}, "restart": 0})
    plan = {"parents": {}, "commits": {}, "content": "", "data": None}
    job = {"stage": "distill", "identity": settings, "fingerprint": "", "plan": plan}
    config = {"run_dir": str(tmp_path), "stages": {"distill": {}}, "force": [], "share": None, "resume": RESUME}
    assert verdicts.verdict_of(config, job, set()) == verdict


def test_where_hashes_cannot_be_remembered_the_files_are_read_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full refuses every write with "no space left on device"; links to it are let lie."""
    monkeypatch.setattr("models.files.remove", lambda path: None)
    monkeypatch.setattr(artifact, "_SETTLED_NS", 0)  # a file that has just been written is remembered, too
    artifact.publish(tmp_path / "distill", _build, HEAD)
    cache = tmp_path / "hashes.json"
    (tmp_path / ".hashes.json.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        artifact.write_json(cache, {})
    (tmp_path / ".hashes.json.partial").symlink_to("/dev/full")
    remembered = artifact.content_hash(tmp_path / "distill", cache)
    assert remembered == artifact.content_hash(tmp_path / "distill")
    assert {path.name for path in tmp_path.iterdir()} == {"distill"}


def test_what_was_hashed_while_it_was_written_is_not_read_again_and_what_changed_since_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "_SETTLED_NS", -(10**12))
    aside, folder = tmp_path / ".rows.partial", tmp_path / "rows"
    aside.mkdir()
    known = {}
    for name in ("a", "b", "c"):
        (aside / name).write_text(name)
        known[name] = hashlib.sha256(name.encode()).hexdigest()
    (aside / "b").write_text("B")
    artifact.seal(aside, {name: known[name] for name in "ab"}, folder, ["a"])
    aside.rename(folder)
    read: list[str] = []
    sha256 = artifact._sha256
    monkeypatch.setattr(artifact, "_sha256", lambda path: (read.append(path.name), sha256(path))[1])
    assert not artifact.sealed(folder)
    assert read == ["b"]


def test_a_command_reads_a_text_once_and_the_next_one_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends tells the next what it knows; a changed file is read again."""
    monkeypatch.setattr(artifact, "_SETTLED_NS", 0)
    monkeypatch.setattr(hashes, "_known", {})
    monkeypatch.setattr(hashes, "_cache", None)
    text, cache = tmp_path / "a.txt", tmp_path / "work" / "hashes.json"
    text.write_text("one")
    read: list[str] = []
    sha256 = artifact._sha256
    monkeypatch.setattr(artifact, "_sha256", lambda path: (read.append(path.name), sha256(path))[1])
    data = Documents(train=str(text))
    keys = {data.content_key() for _ in range(3)}
    assert (len(keys), read) == (1, ["a.txt"])
    hashes.add(cache, hashes.known())
    for _ in range(2):  # as processes that know nothing
        hashes._known.clear()
        hashes.remember_in(cache)
        assert {data.content_key()} == keys
    assert read == ["a.txt"]
    text.write_text("other")
    assert data.content_key() not in keys
    hashes._known.clear()
    hashes.remember_in(cache)
    data.content_key()
    assert read == ["a.txt", "a.txt"]
