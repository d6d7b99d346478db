"""Notice from outside that this job is about to end: SIGUSR1, as `sbatch --signal` gives it before the time limit, or
SIGTERM, as a preemption and `scancel` do.

A training that heeds it ends after its step, with a checkpoint. Whatever else a stage does ends at once, as a kill
would end it: it goes on later from what it has finished. Imports nothing heavy, since it is to stand in a process
before the handlers of libraries do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType

from models.errors import STOPPED, TERMINATED

STATUSES = {signal.SIGUSR1: STOPPED, signal.SIGTERM: TERMINATED}


class Notice:
    """Of this process: while it is heeded, a handler sets a flag and no more. Lightning's own handler would
    talk to the other ranks from within the signal, where they may be in another collective."""

    def __init__(self) -> None:
        self.status = 0  # that the process is to end with, once notice was given
        self._heeded = False
        self._then: Callable[[int], None] | None = None

    def listen(self) -> None:
        """From here on; called again, before handlers that were put in between."""
        for number in STATUSES:
            signal.signal(number, self._given)

    def heed(self, then: Callable[[int], None] | None = None) -> None:
        """Until `unheed` somebody looks at `status` after every step, or is told of it by `then`, which is given the
        signal's number, and ends in good order."""
        self.listen()
        self._heeded, self._then = True, then

    def unheed(self) -> None:
        self._heeded = False
        if self.status:  # given too late for a step to see it
            os._exit(self.status)

    def _given(self, number: int, frame: FrameType | None) -> None:
        self.status = max(self.status, STATUSES[signal.Signals(number)])
        if not self._heeded:
            os._exit(self.status)
        if self._then is not None:
            self._then(number)


notice = Notice()
