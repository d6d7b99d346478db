"""How a seed is derived: from what decides a draw, never from order, batch or rank unless these are named."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def mixed(*numbers: int) -> int:
    """One seed of several numbers, as (seed, step, micro-batch, rank)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def of_answer(seed: int, prompt: Sequence[int], sample: int) -> int:
    """Of one generated answer: 128 bits of the seed, the prompt's tokens and which of its answers it is."""
    digest = hashlib.blake2b(f"{seed} {sample} ".encode(), digest_size=16)
    digest.update(np.asarray(prompt, dtype=np.int64).tobytes())
    return int.from_bytes(digest.digest(), "little")


def of_piece(key: bytes) -> int:
    """Of a piece of text by its key in the teacher cache, for encodings that draw."""
    return int.from_bytes(key[:8], "little") >> 1
