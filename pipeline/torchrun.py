"""torchrun, which ends with the exit status of the rank that failed first. It adds no words to those of the rank, but
where a signal ended it: such a rank has said nothing.

python -m pipeline.torchrun ARGUMENTS
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main


def run(arguments: Sequence[str]) -> int:
    logging.disable(logging.ERROR)  # here alone: the ranks are processes of their own
    try:
        main([*arguments])
    except ChildFailedError as problem:
        rank, first = problem.get_first_failure()
        if first.exitcode > 0:
            return first.exitcode
        names = {each.value: each.name for each in signal.Signals}  # those for real time have none
        by = names.get(-first.exitcode, f"signal {-first.exitcode}")
        print(f"error: rank {rank} was ended by {by}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
