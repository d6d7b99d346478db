"""torchrun, which ends with the exit status of the rank that failed first. It adds no words to those of the rank, but
where a signal ended it: such a rank has said nothing.

python -m pipeline.torchrun ARGUMENTS
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: Sequence[str]) -> int:
    logging.disable(logging.ERROR)  # here alone: the ranks are processes of their own
    signal.signal(signal.SIGUSR1, _hand_on)  # torchrun hands on SIGTERM by itself
    try:
        main([*arguments])
    except SignalException as problem:  # the ranks were told, and have ended
        return 128 + int(problem.sigval)
    except ChildFailedError as problem:
        rank, first = problem.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        names = {each.value: each.name for each in signal.Signals}  # those for real time have none
        by = names.get(-first.exitcode, f"signal {-first.exitcode}")
        print(f"error: rank {rank} was ended by {by}", file=sys.stderr, flush=True)
        return 1
    return 0


def _hand_on(number: int, frame: FrameType | None) -> None:
    """A notice of the job's end, to the ranks."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with suppress(OSError):  # it has ended
                if b"pipeline.worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    os.kill(int(child), number)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
