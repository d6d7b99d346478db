"""What a person can mend, said in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from types import TracebackType


class Refusal(ValueError):
    """The request cannot be carried out as it stands; the message names the value and the remedy.

    The front door prints it without a traceback and exits with status 2. Several problems are a line each.
    """

    @property
    def told(self) -> str:
        return "\n".join(f"error: {line}" for line in str(self).splitlines())


class Problems:
    """Refusals of one check, told at once:

    problems = Problems()
    with problems:  # a refusal in here is kept, and what comes after the block goes on
        ...
    problems.tell()
    """

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __enter__(self) -> Problems:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if isinstance(problem, Exception) and not isinstance(problem, Refusal) and self.lines:
            self.tell()  # it follows from a value that was refused before
        if not isinstance(problem, Refusal):
            return False
        self.add(str(problem))
        return True

    def add(self, message: str) -> None:
        self.lines += [line for line in message.splitlines() if line not in self.lines]

    def tell(self) -> None:
        """Raises Refusal where there are any."""
        if self.lines:
            raise Refusal("\n".join(self.lines))


class StageFailed(RuntimeError):
    """A stage's process ended badly; `code` is its exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


NOT_FINITE = 3  # the exit status of a process that ended with NotFinite
STOPPED = 75  # that of one that was told to make way and has saved what it had: "try again" (sysexits.h)
TERMINATED = 143  # likewise by SIGTERM: nobody asked for another try (128 + 15, as shells say it)


class Stopped(RuntimeError):
    """Training has ended before its last step, since notice was given (`status`); its checkpoint is in place."""

    def __init__(self, step: int, status: int) -> None:
        super().__init__(f"step {step}")
        self.step, self.status = step, status


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight that is not a number; the message names the step, and the sequences if known."""


_OF_STORAGE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ESTALE,
    errno.EMFILE,
}
_OF_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_WRITTEN_BY_TORCH = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos \d+ vs \d+")


def of_writing(problem: BaseException) -> bool:
    """Whether a file could not be written: then whatever was being read is not to blame."""
    return isinstance(problem, OSError) and problem.errno in _OF_ROOM


def of_storage(problem: BaseException, folder: Path) -> str | None:
    """What a file system refused, in one line, or None where `problem` is another one. Libraries hide the error that
    the system gave: it is looked for in what theirs was raised from, and in their words; in what they were handling,
    only if there is no room: what is handled otherwise need not be the reason. `folder`: where space is counted if no
    path is known."""
    seen, handled = problem, False
    while True:
        code = seen.errno if isinstance(seen, OSError) else None
        if code is None and (found := re.search(r"os error (\d+)|\[?[Ee]rrno (\d+)", str(seen))):
            code = int(found[1] or found[2])
        if code in (_OF_ROOM if handled else _OF_STORAGE) or _WRITTEN_BY_TORCH.search(str(seen)):
            path = Path(os.fsdecode(seen.filename)) if isinstance(seen, OSError) and seen.filename else folder
            return _told(path, code, folder)
        if (next_seen := seen.__cause__ or seen.__context__) is None:
            return None
        handled = handled or seen.__cause__ is None
        seen = next_seen


def _told(path: Path, code: int | None, folder: Path) -> str:
    reason = os.strerror(code) if code else "a file could not be written to its end"
    if code in (errno.EROFS, errno.EACCES, errno.EPERM):
        ours = path.absolute().is_relative_to(folder.absolute())
        return f"{path}: {reason}; {'choose a run_dir that can be written to' if ours else 'ask for access to it'}"
    if code == errno.EFBIG:
        reason += ", by a limit on the size of files (ulimit -f)"
    return f"{path}: {reason} ({_free(path)}); what was finished is whole, and the same command goes on from there"


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free / 1e9:.1f} GB are free there"
    except OSError:
        return "how much is free there cannot be told"
