"""Where finished shards of an unfinished stage wait: `record` and `generate` lose one shard of their work at most.

Not in the stage's own work folder, which goes when the stage is begun with other values: hours of a teacher's answers
survive them, and wait for the old values to come back, until a result is published.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.files import written_aside
from pipeline.context import Context


@dataclass(frozen=True)
class Shelf:
    folder: Path

    def open(self, context: Context, part: str = "") -> Path:
        """The folder of the shards, or the part of it for what one fingerprint decides; emptied where the stage is
        forced and was not started before."""
        shards = self.folder / part
        if context.stage in context.config["force"] and not context.restart:
            shutil.rmtree(shards, ignore_errors=True)
        shards.mkdir(parents=True, exist_ok=True)
        return shards

    def clear(self) -> None:
        """Once a result is published."""
        shutil.rmtree(self.folder)


def link(source: Path, target: Path) -> None:
    """The same bytes under a second name: killed in between, neither is lost."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        with written_aside(target) as aside:
            shutil.copy(source, aside)
