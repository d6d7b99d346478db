"""What a person can mend, said in one line."""

from __future__ import annotations

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


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight that is not a number; the message names the step, and the sequences if known."""
