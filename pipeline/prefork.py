"""One process that has imported what the stages of a run need, and forks into the check and into each stage.

PyTorch, transformers and Lightning take some five seconds to import: a run of twelve short stages would spend a minute
on it. The server imports, and does nothing else: it computes nothing, so that the threads which libraries start on
import (OpenBLAS, jemalloc) wait while it forks. It is used only where there is no GPU, since a driver that was asked
once does not survive a fork. Everywhere else, and for stages on several ranks, stages are new processes.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from pipeline.launch import die_with, environment
from pipeline.notice import STATUSES, notice

_MESSAGE_BYTES = 1 << 18
_FDS = 3
_GPUS = ("nvidia[0-9]*", "kfd", "dxg")  # NVIDIA's, AMD's, and what Windows lends


@contextmanager
def server(config: dict[str, Any], stages: Sequence[str]) -> Iterator[Server | None]:
    """For these stages of a run; None where there may be a GPU."""
    if config["trainer"]["accelerator"] != "cpu" and any(path for name in _GPUS for path in Path("/dev").glob(name)):
        yield None
        return
    started = Server(sorted({module for name in stages for module in _modules(config["stages"][name])}))
    try:
        yield started
    finally:
        started.close()


class Server:
    """The server's process, from outside."""

    def __init__(self, modules: Sequence[str]) -> None:
        """`modules` are imported before the first request."""
        self._env = environment(1, "cpu")
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = self._begun(theirs)
        theirs.close()
        self._socket.send(json.dumps([*modules]).encode())

    def _begun(self, theirs: socket.socket) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "pipeline.worker", "serve", str(theirs.fileno())]
        return subprocess.Popen(command, env=self._env, pass_fds=[theirs.fileno()])

    def run(
        self,
        arguments: Sequence[str],
        env: dict[str, str],
        fds: Sequence[int],
        *,
        modules: Sequence[str] = (),
        output: bool = False,
    ) -> int:
        """`python -m pipeline.worker ARGUMENTS`, and its exit status, negative where a signal ended it.

        `fds` stay open in it; with `output` the first two become its standard output and error. `modules` are imported
        before, for it and for all that come after it.
        """
        # What differs alone: a message is bounded, and an environment hardly.
        changed = {name: env.get(name) for name in env.keys() | self._env if env.get(name) != self._env.get(name)}
        request = json.dumps({"arguments": [*arguments], "env": changed, "modules": [*modules], "output": output})
        if not output:
            notice.heed(self._process.send_signal)
        try:
            socket.send_fds(self._socket, [request.encode()], [*fds])
            answer = self._socket.recv(64)
        except ConnectionError:
            answer = b""
        code = int(answer) if answer else -signal.SIGKILL  # the server itself was killed
        if code == 0:
            notice.unheed()
        return code

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.wait()


def _modules(node: Any) -> Iterator[str]:
    """Of all classes that a stage's node names."""
    if isinstance(node, dict):
        if isinstance(target := node.get("_target_"), str):
            yield target.rpartition(".")[0]
        node = list(node.values())
    if isinstance(node, list):
        for value in node:
            yield from _modules(value)


def serve(fd: int, main: Callable[[Sequence[str]], int]) -> int:
    """Import what is asked for, then fork for each request, one at a time, until the front door is gone. `main` is
    what a child runs."""
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the children's and the front door's
    running: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        for child in running:
            os.kill(child, number)

    for number in STATUSES:  # a notice is the child's; without one it changes nothing here
        signal.signal(number, hand_on)
    connection = socket.socket(fileno=fd)
    _import(json.loads(connection.recv(_MESSAGE_BYTES) or b"[]"))
    while True:
        message, fds, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, _FDS)
        if not message:
            return 0
        request = json.loads(message)
        _import(request["modules"])
        sys.stdout.flush()
        sys.stderr.flush()
        if child := os.fork():
            for each in fds:
                os.close(each)
            running.append(child)
            _, status = os.waitpid(child, 0)
            running.clear()
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())
            continue
        connection.close()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, value in request["env"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if request["output"]:
            for standard, each in zip((1, 2), fds, strict=False):
                os.dup2(each, standard)
        _end(main(request["arguments"]))


def _import(modules: Sequence[str]) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception:  # whoever needs it says so, with the setting's name
            continue


def _end(code: int) -> NoReturn:
    """As multiprocessing ends its children, and with exit handlers: taking apart all that was imported takes 2 s."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
