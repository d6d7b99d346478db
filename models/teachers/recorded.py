"""A teacher whose signal is on disk: its weights are never opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.cache import Cache, pieces_of
from models.objectives.representation import Wanted
from models.objectives.signal import Signal
from models.teachers.teacher import Looked, Opening, Result


class Recorded:
    """Looks up the pieces of each batch in a cache."""

    def __init__(self, folder: str, opening: Opening) -> None:
        self.cache, self.opening = Cache(Path(folder)), opening

    def check(self) -> None:
        """The front door has held the cache's header against teacher, tokenizer and objective."""

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        return Looked(batch)

    def give(self, looked: Looked, work: Callable[[Signal], Result]) -> Result:
        batch = looked.batch
        device = batch["input_ids"].device
        pieces = pieces_of(batch, self.cache.fingerprint)
        payload = self.cache.read([piece.key for piece in pieces], device)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
        return work(self.cache.encoding.signal(payload, self.cache.open_head(device, dtype)))

    def close(self) -> None:
        self.cache.opened.clear()
