"""`python train.py`, forked from a process that has imported everything: five seconds of imports less for each command.

The command's own server (pipeline/prefork.py), which would import it all again, is forked as well. Stages on several
ranks are new processes as ever.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import prefork, worker
from pipeline.launch import die_with

ROOT = Path(__file__).resolve().parent.parent


class _Preloaded(prefork.Server):
    def _begun(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.preloaded", str(theirs.fileno())]
        self._env |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=self._env, cwd=ROOT, pass_fds=[theirs.fileno()])

    def ended_after(self, seconds: float) -> None:
        self._socket.settimeout(seconds)


@functools.cache
def _server() -> _Preloaded:
    # Not callbacks: W&B has a temporary folder from its import on, which the first child would take along.
    files = sorted(path for room in ("models", "pipeline") for path in (ROOT / room).rglob("*.py"))
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    made = _Preloaded(["hydra", "deepspeed", *modules])
    atexit.register(made.close)
    return made


def run(words: Sequence[str], env: dict[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of the command, with its output as text: to the end of the last process that writes to it.
    Raises TimeoutError."""
    server = _server()
    server.ended_after(timeout)
    pipes, read = [os.pipe() for _ in range(2)], [b"", b""]

    def drain(number: int) -> None:
        with open(pipes[number][0], "rb") as file:
            read[number] = file.read()

    readers = [threading.Thread(target=drain, args=[number], daemon=True) for number in range(2)]
    for reader in readers:
        reader.start()
    try:
        code = server.run([os.getcwd(), *words], env, [writes for _, writes in pipes], output=True)
    except BaseException:
        _end_server()
        raise
    finally:
        for _, writes in pipes:
            os.close(writes)
    if code == -signal.SIGKILL:  # perhaps of the server itself
        _end_server()
    for reader in readers:
        reader.join(timeout)
        if reader.is_alive():
            raise TimeoutError(f"train.py {shlex.join(words)}: it has ended, and a process of its own has not")
    out, err = (each.decode() for each in read)
    return subprocess.CompletedProcess(["train.py", *words], code, out, err)


def _end_server() -> None:
    _server().close()
    _server.cache_clear()


def _train(arguments: Sequence[str]) -> int:
    """In a child: what `python train.py` does, and its exit status."""
    die_with(os.getppid())
    warnings.resetwarnings()  # which processes of stages silence, and the front door shows as Python does
    for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", kind)
    os.chdir(arguments[0])
    sys.argv = [str(ROOT / "train.py"), *arguments[1:]]
    prefork.Server = _Forking  # type: ignore[misc]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Forking(prefork.Server):
    """The server of a command's stages, as it would be started, but for its imports."""

    def _begun(self, theirs: socket.socket) -> Any:
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            return _Process(child)
        self._socket.close()
        os.environ.update(self._env)
        return prefork._end(prefork.serve(theirs.detach(), worker.main))


class _Process:
    """Of a forked child, what `prefork.Server` asks of a process."""

    def __init__(self, child: int) -> None:
        self._child = child

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._child, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self._child, 0)


if __name__ == "__main__":
    worker._quiet()
    sys.exit(prefork.serve(int(sys.argv[1]), _train))
