"""The target of a position at which nothing is predicted; PyTorch's own, as its cross-entropy has it."""

IGNORED = -100
