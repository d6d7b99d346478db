"""Folders that DeepSpeed offloads to: refused in a line where it could not use them, one for each model, none left."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from models import nvme
from models.errors import Refusal
from models.teachers.sharded import Sharded
from pipeline.training.settings import check_nvme
from pipeline.training.strategy import ZeRO
from tests.command import ROOT
from tests.pruning.families import model_of

MB = 10**6


def refused(path: Path, disk: int = 0, locked: int = 0) -> str:
    with pytest.raises(Refusal) as problem:
        nvme.check(str(path), "strategy.nvme_path", disk=disk, locked=locked)
    said = str(problem.value)
    assert said.startswith(f"strategy.nvme_path={path}: ")
    assert "\n" not in said
    assert not list(path.glob("*"))
    return said


def test_a_folder_must_be_there(tmp_path: Path) -> None:
    assert "there is no such folder here" in refused(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    assert "that is a file" in refused(tmp_path / "file")


def test_a_disk_that_would_be_full_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed takes a write that fails for done."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000 * MB))
    assert "16,000 MB are to be put there and 3,000 MB are free" in refused(tmp_path, disk=16_000 * MB)


def without_direct(error: int) -> Callable[..., int]:
    def opened(path: str, flags: int, *mode: int, **words: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(error, os.strerror(error))
        return _open(path, flags, *mode, **words)

    return opened


_open = os.open


def test_a_disk_without_direct_reads_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", without_direct(22))
    assert "it cannot be written to (Invalid argument) past the system's cache" in refused(tmp_path)


def test_blocks_that_are_not_read_back_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, at: len(buffers[0]))  # which stay as they were
    assert "what is written there is not read back" in refused(tmp_path)


def test_memory_that_may_not_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8 * MB, 8 * MB))
    monkeypatch.setattr(nvme, "_capable", lambda _: False)
    said = refused(tmp_path, locked=1600 * MB)
    assert "1,600 MB of buffers must be locked in memory, and 8 MB may be; raise that (ulimit -l unlimited)" in said
    monkeypatch.setattr(nvme, "_capable", lambda _: True)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    nvme.check(str(tmp_path), "strategy.nvme_path", disk=MB, locked=1600 * MB)
    assert not list(tmp_path.iterdir())


def test_capabilities_are_those_of_the_process() -> None:
    told = subprocess.run(["grep", "CapEff", "/proc/self/status"], capture_output=True, text=True, check=True).stdout
    assert nvme._capable(14) == bool(int(told.split()[1], 16) & 1 << 14)


def test_a_missing_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: False)
    assert "DeepSpeed needs libaio" in refused(tmp_path)


class Builder:
    """Of a part of DeepSpeed: compiled by PyTorch, which waits for the file `lock`."""

    name = "retort_test"

    def __init__(self, folder: Path) -> None:
        self.folder, self.locked = folder, True

    def load(self, verbose: bool) -> None:
        self.locked = (self.folder / "lock").exists()


def test_a_lock_that_a_killed_process_left_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / Builder.name
    folder.mkdir()
    (folder / "lock").touch()
    gone = subprocess.Popen(["true"])
    gone.wait()
    (folder / "retort.compiling").write_text(f"{nvme._this_machine()} {gone.pid}")
    builder = Builder(folder)
    nvme._load(builder)
    assert not builder.locked
    assert f"compiling a part of DeepSpeed into {folder}" in capsys.readouterr().out
    (folder / "lock").touch()  # another program's
    nvme._load(builder)
    assert builder.locked
    assert f"waiting for {folder / 'lock'}" in capsys.readouterr().out
    assert not (folder / "retort.compiling").exists()
    for living in (f"{nvme._this_machine()} {os.getpid()}", f"another.machine 1-2-3 {gone.pid}"):
        (folder / "retort.compiling").write_text(living)
        nvme._load(builder)
        assert builder.locked
        assert (folder / "retort.compiling").read_text() == living


def test_a_file_system_without_locks_and_a_failure_to_compile_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    class Broken(Builder):
        def load(self, verbose: bool) -> None:
            raise RuntimeError("no compiler")

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refuse)
    (folder := tmp_path / Builder.name).mkdir()
    with pytest.raises(RuntimeError, match="no compiler"):
        nvme._load(Broken(folder))
    assert [path.name for path in folder.iterdir()] == ["retort.lock"]


@pytest.mark.parametrize(
    ("told", "ranks", "here"),
    [
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 16, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,4(x3),1"}, 15, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8"}, 2, 2),
        ({}, 8, 1),
    ],
)
def test_ranks_of_this_machine_are_known_whoever_started_them(
    told: dict[str, str], ranks: int, here: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert nvme.ranks_here(ranks) == here


def test_what_a_killed_run_left_is_removed_before_space_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / f"{nvme._prefix()}left"
    left.mkdir()
    os.utime(left, (1, 1))
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free._replace(free=0 if left.exists() else 10 * MB))
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda *_, **__: True)
    nvme.check(str(tmp_path), "strategy.nvme_path", disk=4 * MB, locked=0)
    assert not left.exists()


def test_a_teacher_and_an_optimizer_on_one_disk_are_counted_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(nvme, "check", lambda *_, disk, locked: asked.append(disk))
    model_of("llama", dtype=torch.float32).save_pretrained(tmp_path / "teacher")
    size = sum(each.numel() for each in model_of("llama").parameters())
    teacher = Sharded(path=str(tmp_path / "teacher"), dtype="bfloat16", offload="nvme", nvme_path=str(tmp_path))
    strategy = ZeRO(3, offload_optimizer=True, nvme_path=str(tmp_path))
    context: Any = SimpleNamespace(devices=2, world=2, strategy=strategy, config_folder=str)
    check_nvme(context, 1000, teacher)
    check_nvme(context, 1000, None)
    monkeypatch.setattr(nvme, "one_disk", lambda *_: False)
    check_nvme(context, 1000, teacher)
    assert asked == [16 * 1000 + 2 * (size + size % 2), 16 * 1000, 16 * 1000]


def test_what_killed_processes_of_this_machine_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    """In a process of its own, as its end removes what it has made."""
    code = (
        "import os, sys; from pathlib import Path; from models import nvme\n"
        "root = Path(sys.argv[1]); mine = nvme._own_folder(sys.argv[1]); assert Path(mine).is_dir()\n"
        "for name in os.listdir(root):\n"
        "    os.utime(root / name, (1, 1), follow_symlinks=False)\n"
        "other = nvme._own_folder(sys.argv[1])\n"
        "print(*sorted(os.listdir(root)), Path(mine).name, Path(other).name)"
    )
    of_this_machine = nvme._prefix()
    kept = ["elsewhere", "others", "retort-offloaded-another.machine-left", f"{of_this_machine}link"]
    for name in (f"{of_this_machine}left", *kept[:-1]):
        (tmp_path / name).mkdir()
    (tmp_path / f"{of_this_machine}left" / "1_param.tensor.swp").touch()
    (tmp_path / kept[-1]).symlink_to(tmp_path / "elsewhere")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    *held, mine, other = done.stdout.split()
    assert held == sorted([*kept, mine, other])  # the first is locked, however old it is
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
