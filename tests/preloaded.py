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
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
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
    """As `subprocess.run` of the command, with its output as text. Raises TimeoutError."""
    server = _server()
    server.ended_after(timeout)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            code = server.run([os.getcwd(), *words], env, [out.fileno(), err.fileno()], output=True)
        except TimeoutError:
            server.close()
            _server.cache_clear()
            raise
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(["train.py", *words], code, out.read(), err.read())


def _train(arguments: Sequence[str]) -> int:
    """In a child: what `python train.py` does, and its exit status."""
    die_with(os.getppid())
    os.chdir(arguments[0])
    sys.argv = [str(ROOT / "train.py"), *arguments[1:]]
    prefork.Server = _Forking  # type: ignore[misc]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
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
