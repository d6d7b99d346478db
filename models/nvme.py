"""Folders on disks of this machine to which DeepSpeed offloads (ZeRO-Infinity, arXiv:2104.07857).

They are looked at before anything is loaded: DeepSpeed counts a write that has failed as done, and its other complaints
are assertions. Each model of each process has a folder of its own, since DeepSpeed's names in it are always the same.
"""

from __future__ import annotations

import atexit
import fcntl
import mmap
import os
import re
import resource
import shutil
import socket
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from models.errors import Refusal

BUFFERS = 5  # of the largest weight's share, through which DeepSpeed reads weights
_YOUNG_SECONDS = 60
_LOCKS_MEMORY = 14  # CAP_IPC_LOCK
_made: list[str] = []


def check(path: str, key: str, *, disk: int, locked: int) -> None:
    """Refuse a folder that DeepSpeed cannot use on this machine. `key`: the setting that names it; `disk`: bytes of all
    that this machine's ranks put there; `locked`: bytes of a rank's buffers, which must stay in memory."""
    told = f"{key}={path}"
    if not os.path.isdir(path):
        what = "that is a file" if os.path.exists(path) else "there is no such folder here"
        raise Refusal(f"{told}: {what}; give a folder on a local disk, with its whole path")
    if not os.access(path, os.W_OK):
        raise Refusal(f"{told}: this folder cannot be written to; give one on a local disk")
    _sweep(path)
    if (free := shutil.disk_usage(path).free) < disk:
        raise Refusal(
            f"{told}: {disk / 1e6:,.0f} MB are to be put there and {free / 1e6:,.0f} MB are free; give another "
            f"folder, or use more machines"
        )
    if (problem := _direct(path)) is not None:
        raise Refusal(
            f"{told}: {problem} past the system's cache, as DeepSpeed does; give a folder on a local NVMe disk"
        )
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and limit < locked and not _capable(_LOCKS_MEMORY):
        raise Refusal(
            f"{told}: {locked / 1e6:,.0f} MB of buffers must be locked in memory, and {limit / 1e6:,.0f} MB may be; "
            f"raise that (ulimit -l unlimited), or offload to host memory"
        )
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise Refusal(
            f"{told}: DeepSpeed needs libaio, which is missing here; install it (Debian: libaio-dev), or offload to "
            f"host memory"
        )


def _direct(path: str) -> str | None:
    """What is wrong with reading and writing there by O_DIRECT, in the sizes that DeepSpeed has: multiples of 1 kB."""
    size = 2**20 + 2**10
    with tempfile.TemporaryDirectory(prefix=_prefix(), dir=path) as folder, mmap.mmap(-1, size) as buffer:
        try:
            handle = os.open(os.path.join(folder, "probe"), os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
            try:
                buffer[:] = os.urandom(size)
                if os.writev(handle, [buffer]) != size:
                    return "nothing can be written there"
                expected, buffer[:] = bytes(buffer), bytes(size)
                if os.preadv(handle, [buffer], 0) != size or bytes(buffer) != expected:
                    return "what is written there is not read back"
            finally:
                os.close(handle)
        except OSError as problem:
            return f"it cannot be written to ({problem.strerror})"
    return None


def _capable(capability: int) -> bool:
    try:
        told = re.search(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return False
    return told is not None and bool(int(told[1], 16) >> capability & 1)


def folder_in(path: str) -> str:
    """A new folder in `path`, for one model of this process, and DeepSpeed ready to use it. Removed when the process
    ends; what killed processes of this machine have left is removed here."""
    from deepspeed.ops import op_builder

    _load(op_builder.AsyncIOBuilder())
    # With which DeepSpeed pins memory where PyTorch cannot; older versions have none.
    if not torch.cuda.is_available() and (pinning := getattr(op_builder, "PinMemoryBuilder", None)) is not None:
        _load(pinning())
    return _own_folder(path)


def one_disk(path: str, other: str) -> bool:
    """Whether what is put into both folders takes the same space."""
    try:
        return os.stat(path).st_dev == os.stat(other).st_dev
    except OSError:
        return False


def ranks_here(ranks: int) -> int:
    """Of so many ranks those on this machine, as torchrun or srun says: of srun the most on any of its machines."""
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")  # 8(x2),4
    return min(ranks, max(int(each) for each in re.sub(r"\(x\d+\)", "", told).split(",")))


def _sweep(path: str) -> None:
    for left in Path(path).glob(f"{_prefix()}*"):
        with suppress(OSError):
            old = time.time() - left.stat().st_mtime > _YOUNG_SECONDS  # or its process is about to lock it
            if old and not left.is_symlink() and (handle := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(handle)


def _own_folder(path: str) -> str:
    _sweep(path)
    made = tempfile.mkdtemp(prefix=_prefix(), dir=path)
    _lock(Path(made))  # for as long as this process lives
    _made.append(made)
    return made


@atexit.register
def remove() -> None:
    """What this process has made. To be called where it ends without its exit handlers."""
    while _made:
        shutil.rmtree(_made.pop(), ignore_errors=True)


def _prefix() -> str:
    """Of this machine's folders: a lock says nothing of processes of another one, which may see the same disk."""
    return f"retort-offloaded-{socket.gethostname()}-"


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder; None where another process does."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _load(builder: Any) -> None:
    """Load an operator of DeepSpeed, which is compiled the first time. PyTorch waits without an end, and without a
    word, for a process that was killed while it compiled; one of ours is known by what it left beside."""
    from deepspeed.git_version_info import installed_ops
    from torch.utils.cpp_extension import _get_build_directory

    if installed_ops.get(builder.name, False):
        builder.load(verbose=False)
        return
    folder = Path(_get_build_directory(builder.name, verbose=False))
    others, marker = folder / "lock", folder / "retort.compiling"
    with open(folder / "retort.lock", "w") as held:
        with suppress(OSError):  # some cluster file systems have no locks
            fcntl.flock(held, fcntl.LOCK_EX)  # of Retort's processes one at a time
        if _killed(marker):
            others.unlink(missing_ok=True)
            marker.unlink(missing_ok=True)
        elif others.exists():
            print(f"waiting for {others}, of a program that compiles; remove it if there is none", flush=True)
        if not (folder / f"{builder.name}.so").exists():
            print(f"compiling a part of DeepSpeed into {folder}, once: some minutes", flush=True)
        mine = not marker.exists()  # else that of another machine, which compiles
        if mine:
            marker.write_text(f"{_this_machine()} {os.getpid()}")
        try:
            builder.load(verbose=False)
        finally:
            if mine:
                marker.unlink(missing_ok=True)


def _killed(marker: Path) -> bool:
    """Whether the process that wrote it is known to be gone: it ran on this machine, since it was last started."""
    try:
        machine, _, process = marker.read_text().rpartition(" ")
        return machine == _this_machine() and not Path("/proc", str(int(process))).exists()
    except (OSError, ValueError):
        return False


def _this_machine() -> str:
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"
    return socket.gethostname()
