"""What a person can mend, said in one line."""


class Refusal(ValueError):
    """The request cannot be carried out as it stands; the message names the value and the remedy.

    The front door prints it without a traceback and exits with status 2.
    """


class StageFailed(RuntimeError):
    """A stage's process ended badly; `code` is its exit status."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class NotFinite(RuntimeError):
    """A loss, a gradient or a weight that is not a number; the message names the step, and the sequences if known."""
