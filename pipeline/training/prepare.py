"""What one process does before the ranks of a stage that trains start: text into sequences, and the start's weights."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.errors import Refusal
from models.files import remove
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.pairs import common_prefix
from pipeline.data.prepared import sequences_of
from pipeline.data.rendering import with_template
from pipeline.data.source import DataSource
from pipeline.training.checkpoints import choose

_LEFT_OUT = ("held_out", "demonstrations_left_out", "across")  # of the text, and worth a line


@dataclass(frozen=True)
class Prepared:
    """What the ranks find: folders, and what was counted of the text."""

    start: str  # the model that training starts from
    train: str
    validation: str | None
    statistics: dict[str, Any]  # by split
    prefix: list[int]  # tokens that the teacher's side of every training sequence begins with
    checkpoint: str | None  # what training goes on from

    @classmethod
    def read(cls, work: Path) -> Prepared:
        return cls(**json.loads((work / artifact.PREPARED).read_text()))

    def write(self, work: Path) -> None:
        artifact.write_json(work / artifact.PREPARED, asdict(self))


def prepare(
    context: Context,
    data: DataSource,
    tokenizer: Any,
    write_start: Callable[[Path], None],
    teacher_tokenizer: Any = None,
) -> None:
    """Tokenize and pack, and write the weights training starts from. One process; the ranks come after."""
    context.work.mkdir(parents=True, exist_ok=True)
    with_template(tokenizer, data)  # the finished model is to be talked to as it was taught
    folders: dict[str, str | None] = {}
    statistics = {}
    for split in ("train", "validation"):
        other = teacher_tokenizer if split == "train" else None
        sequences, statistics[split], folder = sequences_of(data, split, tokenizer, context.data_folder, other)
        folders[split] = str(folder) if len(sequences) else None
        if split == "train":
            prefix = common_prefix(sequences)
        if left_out := {name: count for name in _LEFT_OUT if (count := statistics[split].get(name))}:
            counts = ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in left_out.items())
            print(f"{context.stage}: {split}: {counts}", flush=True)
        if split == "train" and (beyond := [n for n in context.skipped if n >= len(sequences)]):
            raise Refusal(f"resume.skip_sequences={beyond}: the text makes {len(sequences):,} sequences, from 0 on")
        if split == "train" and not len(sequences):
            raise Refusal(f"{context.stage}: no text of data.train is left after tokenizing ({statistics[split]})")
    start = context.work / "start"
    if start.exists() and not artifact.sealed(start):
        print(f"{context.stage}: {start} was changed since it was written; it is made again", flush=True)
        remove(start)
    if not start.exists():
        aside = context.work / ".start.partial"
        remove(aside)
        write_start(aside)
        artifact.seal(aside)
        os.rename(aside, start)
    newest = choose(context)
    Prepared(
        str(start),
        str(folders["train"]),
        folders["validation"],
        statistics,
        prefix,
        None if newest is None else str(newest),
    ).write(context.work)
