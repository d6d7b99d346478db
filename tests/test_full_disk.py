"""A file system that refuses a write: at each kind of call of a small run of every kind of stage."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import pytest

from models.errors import Refusal
from models.whole import whole
from pipeline.run_folder import claimed
from tests.command import ROOT, train
from tests.full_disk import COMPILER, FullDisk, pattern_of

with_compiler = pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C compiler")
STAGES = ("pretrain", "distill", "control", "prune", "recover", "quantize", "qat", "unquantized", "export", "evaluate")
WORDS = [
    "trainer.accelerator=cpu",
    "data.max_documents=60",
    "data.max_length=64",
    "stages.pretrain.tokenizer.vocab_size=400",
    "stages.pretrain.model.hidden_size=64",
    "stages.pretrain.model.intermediate_size=128",
    "stages.pretrain.model.num_hidden_layers=2",
    "student.shape.hidden_size=32",
    "student.shape.intermediate_size=96",
    "student.shape.num_hidden_layers=1",
    "student.shape.num_attention_heads=2",
    "student.shape.num_key_value_heads=2",
    *(f"stages.{stage}.training.max_steps=3" for stage in ("pretrain", "distill", "recover", "qat")),
    *(f"stages.{stage}.training.validate_every_steps=2" for stage in ("pretrain", "distill", "recover", "qat")),
    "trainer.checkpoint.every_steps=1",
    "trainer.log_every_steps=1",
    "stages.evaluate.speed={_target_: models.measure.Speed, prompt_tokens: 16, new_tokens: 4, repeats: 1}",
]
# Kinds of calls that are tried of each stage; RETORT_TEST_KINDS=999 tries all of them, in two hours.
MOST = int(os.environ.get("RETORT_TEST_KINDS", "14"))
# What a run does without: hashes are taken again, a copy is made another way.
COPIED = r"quantized\.safetensors|metrics\.jsonl|(tokenizer|tokenizer_config|generation_config)\.json"
HARMLESS = re.compile(rf"hashes\.json|^link |^rename .*/pieces\.arrow|^write .*partial/({COPIED})")


def test_a_full_disk_is_not_told_as_a_model_that_does_not_open() -> None:
    """Layers that transformers merges on loading are written aside."""
    with pytest.raises(OSError, match="No space left"), whole("model.path=/m", "it does not open"):
        raise OSError(errno.ENOSPC, "No space left on device", "/run/work/quantize/given")
    with pytest.raises(Refusal, match="does not open"), whole("model.path=/m", "it does not open"):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/m/config.json")


WRITES = """
import os, shutil, sys
from pathlib import Path
import numpy as np
def python(path): path.write_text("text")
def descriptor(path): os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
def array(path): np.arange(9).tofile(path)
def arrow(path):
    import pyarrow as pa
    with pa.OSFile(str(path), "wb") as sink: sink.write(b"bytes")
def tensors(path):
    from safetensors.numpy import save_file
    save_file({"a": np.arange(9)}, path)
def tokenizer(path):
    from tokenizers import Tokenizer, models
    Tokenizer(models.BPE()).save(str(path))
def copied(path): shutil.copyfile(__file__, path)
def synced(path):
    handle = os.open(path.parent, os.O_RDONLY)
    os.fsync(handle)
def folder(path): path.mkdir()
def renamed(path): os.rename(path.parent / "there", path)
try:
    locals()[sys.argv[1]](Path(sys.argv[2]) / "file")
except Exception as problem:
    sys.exit(f"{type(problem).__name__}: {problem}")
"""


@with_compiler
@pytest.mark.parametrize(
    "kind",
    ["python", "descriptor", "array", "arrow", "tensors", "tokenizer", "copied", "synced", "folder", "renamed"],
)
def test_the_preloaded_disk_refuses_what_python_rust_and_cpp_write(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "there").touch()
    script = tmp_path / "writes.py"
    script.write_text(WRITES)
    disk = FullDisk(tmp_path, run)
    for under, fails in ((run, True), (tmp_path / "other", False)):
        disk.under = under
        disk.refuse("*", every=True)
        done = subprocess.run(
            [sys.executable, str(script), kind, str(run)],
            env={**os.environ, **disk.environment},
            capture_output=True,
            text=True,
        )
        assert (disk.refused > 0, done.returncode != 0) == (fails, fails), done.stderr
        assert not fails or re.search("No space left|written", done.stderr), done.stderr


REFUSED = {  # what happened to a run folder → what the command says
    "no space is left where it lies": (errno.ENOSPC, "No space left on device ("),
    "it is read-only": (errno.EROFS, "Read-only file system; choose a run_dir that can be written to"),
}


@with_compiler
@pytest.mark.parametrize(
    "happened", ["no space is left where it lies", pytest.param("it is read-only", marks=pytest.mark.slow)]
)
def test_a_run_folder_that_takes_nothing_is_refused_and_left_as_it_is(tmp_path: Path, happened: str) -> None:
    code, told = REFUSED[happened]
    run_dir = tmp_path / "run"
    with claimed(run_dir):
        pass
    before = _names(run_dir)
    disk = FullDisk(tmp_path, run_dir)
    disk.refuse("*", code, every=True)
    done = train(f"run_dir={run_dir}", *WORDS, "stop=pretrain", **disk.environment)
    assert done.returncode == 2, done.stdout + done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line]
    assert error.startswith(f"error: {run_dir}"), error
    assert told in error
    assert _names(run_dir) == before
    row = f"| {happened} | refused: “…{told}…” |"
    assert row in (ROOT / "docs" / "concepts" / "run_folder.md").read_text(), row


@with_compiler
@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_a_full_disk_at_any_kind_of_write_is_told_in_one_line_and_loses_nothing(tmp_path: Path) -> None:
    """Kind: the call, and the path without its numbers. In turn only that call fails, or every one from it on."""
    whole_run, cut, calls = tmp_path / "whole" / "run", tmp_path / "cut" / "run", dict[str, list[str]]()
    disk = FullDisk(tmp_path, whole_run)
    for stage in STAGES:
        disk.refuse("")
        assert train(f"run_dir={whole_run}", *WORDS, f"stop={stage}", **disk.environment).returncode == 0
        calls[stage] = disk.calls
    disk.under, codes, unmet, tried = cut, cycle([errno.ENOSPC, errno.EDQUOT, errno.EFBIG]), [], 0
    for stage, patterns in _kinds(calls):
        words = [f"run_dir={cut}", *WORDS, f"stop={stage}"]
        for pattern in patterns:
            every, code = bool(tried % 2), next(codes)
            hashes = "hashes.json" in pattern
            for _ in range(2):
                for remembered in cut.rglob("*hashes.json") if hashes else ():
                    remembered.unlink()
                disk.refuse(pattern, code, every)
                done = train(*words, **disk.environment)
                if disk.refused or done.returncode:
                    break
                # It was done by the call before: begin it again. Of text that is as young no hash is remembered.
                for made in (cut / stage, cut / "logs" / stage, *(() if hashes else (cut / "work" / "data",))):
                    shutil.rmtree(made, ignore_errors=True)
            tried += bool(disk.refused)
            unmet += [] if disk.refused else [pattern]
            _check_told(f"{pattern} {errno.errorcode[code]} {every}", done, cut)
            if done.returncode == 0:
                assert _kept(cut / stage) == _kept(whole_run / stage), pattern
                shutil.rmtree(cut / stage)
            until = time.monotonic() + 10
            while disk.users() and time.monotonic() < until:
                time.sleep(0.1)
            assert disk.users() == [], pattern
        disk.refuse("")
        done = train(*words, **disk.environment)
        assert done.returncode == 0, done.stderr
        assert _kept(cut / stage) == _kept(whole_run / stage)
    assert _names(cut) <= _names(whole_run)  # prepared text was removed above
    assert {name for name in _names(whole_run) - _names(cut) if not name.startswith("work/data/")} == set()
    print(f"{sum(map(len, calls.values()))} calls, {tried} tried, not met again: {unmet}")
    assert tried > 9 * len(unmet)


@with_compiler
@pytest.mark.slow
@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
def test_of_two_ranks_one_tells_of_the_full_disk(tmp_path: Path, rank: int, every: bool) -> None:
    disk = FullDisk(tmp_path, tmp_path / "run")
    ranks = ["strategy=zero2", "trainer.devices=2", "stages.pretrain.training.micro_batch=4"]
    words = [f"run_dir={tmp_path / 'run'}", *WORDS, "stop=pretrain", *ranks]
    disk.refuse(f"write *step-00000002*rank-{rank:05d}.safetensors", every=every)
    done = train(*words, **disk.environment)
    assert disk.refused, done.stdout + done.stderr
    _check_told(f"rank {rank}", done, tmp_path / "run")
    again = train(*words)
    assert again.returncode == 0, again.stderr
    assert "goes on at step 1/3" in again.stdout


def _kinds(calls: dict[str, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Stage → patterns of calls that no stage before it has, in order; of many some, evenly."""
    seen = set()
    for stage, called in calls.items():
        found = []
        for call in called:
            pattern = pattern_of(call)
            kind = re.sub(rf"(/\.?)({'|'.join(STAGES)})(?=[/.]|$)", r"\1STAGE", pattern)
            if kind.startswith(("fsync /.", "link /.")):  # the files of an artifact, one after the other
                kind = re.sub(r"partial/.*", "partial/", kind)
            if kind not in seen:
                found.append(pattern)
            seen.add(kind)
        yield stage, found[:: -(-len(found) // MOST) or 1]


def _check_told(what: str, done: subprocess.CompletedProcess[str], run_dir: Path) -> None:
    said = done.stdout + done.stderr
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, what + said
    if done.returncode == 0:
        assert HARMLESS.search(what.rpartition(" ")[0].rpartition(" ")[0]), what
        assert errors == [], what
        return
    assert done.returncode == 2, what + said
    assert len(errors) == 1, what + said
    assert str(run_dir) in errors[0], what
    assert "are free there" in errors[0], what + said


def _kept(folder: Path) -> dict[str, str]:
    """The hash of each file that a model is read from; evaluations have none."""
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    files = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".gguf") or path.name in names]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _names(folder: Path) -> set[str]:
    """Of all that lies there; what is remembered of hashes may be there or not."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.endswith("hashes.json")}
