"""A bound on a chat template at work: it is a program that comes with a model."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from models.errors import Refusal

SECONDS = 10.0  # of computing, for one conversation rendered once; templates take thousandths of one


class _TooLong(BaseException):  # nothing that looks for what a template cannot take may catch it
    pass


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Refuse a template that does not end (as `timed` finds), or that takes more memory or depth than there is.
    `where`: the conversation."""
    try:
        yield
    except (_TooLong, RecursionError, MemoryError) as problem:
        why = {
            _TooLong: f"does not end: nothing after {SECONDS:g} s of computing",
            RecursionError: "is nested too deeply",
            MemoryError: "takes more memory than there is",
        }[type(problem)]
        raise Refusal(f"{where}: the chat template {why}; give another one, data.chat_template=FILE") from None


@contextmanager
def timed() -> Iterator[None]:
    """A template at work once, which `bounded` has around it: a conversation of many turns is rendered many times.

    By the timer that counts the process's own computing, so that a busy machine refuses nobody. Only a process's first
    thread can be told of it; all text is prepared there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, ring)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
