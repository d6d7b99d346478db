"""Kills the process outright at a file operation of its choosing: on the import path only where a test puts it.

RETORT_TEST_KILL = "EVENT PART COUNT": at the COUNT-th audit event EVENT (os.rename, open, …) whose first argument
contains PART, SIGKILL the process, before the operation happens.
"""

import os
import signal
import sys

_wanted = os.environ.get("RETORT_TEST_KILL")
if _wanted:
    _event, _part, _count = _wanted.split()
    _left = [int(_count)]

    def _hook(event, arguments):
        if event == _event and arguments and _part in str(arguments[0]):
            _left[0] -= 1
            if _left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(_hook)
