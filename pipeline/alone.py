"""Work in a fresh process, whose memory is nobody else's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from models.errors import Refusal


class Alone:
    """A server that has imported some modules but run nothing: its children start clean and quickly."""

    def __init__(self, imported: Sequence[str]) -> None:
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(list(imported))

    def __call__(self, work: Callable[..., Any], *words: Any, killed: str) -> Any:
        """`work(*words)`; raises a Refusal that says `killed` where something has ended the process."""
        with ProcessPoolExecutor(1, mp_context=self._processes) as pool:
            try:
                return pool.submit(work, *words).result()
            except BrokenProcessPool:
                raise Refusal(killed) from None
