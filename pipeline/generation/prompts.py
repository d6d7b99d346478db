"""The prompts that a teacher is asked, as files: one a split, each prompt once, none that was held out in train."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.answer_shards import PROMPTS_SCHEMA, write_whole
from pipeline.data.prepared import SPELLINGS
from pipeline.data.source import SPLITS, Prompt
from pipeline.generation.request import provenance

_LEFT_OUT = (
    "duplicate_prompts",
    "held_out",
    "too_long",
    "too_short",
    "without_prompt",
    "left_out_by_task",
    "across",
    "demonstrations_left_out",
)


@dataclass
class Chosen:
    """Which prompts are asked, over all splits; what is left out is counted in `tally`."""

    header: str  # of pipeline.generation.request.provenance
    room: int | None  # tokens of the longest prompt that can still be answered; None: no limit
    tally: Counter[str] = field(default_factory=Counter)
    longest: int = 0  # of those without room
    _taken: set[bytes] = field(default_factory=set)  # what was asked
    _split_of: dict[bytes, str] = field(default_factory=dict)  # of what a student reads

    def of(self, split: str, prompts: Iterable[Prompt]) -> Iterator[dict[str, Any]]:
        """Those of a split as rows of PROMPTS_SCHEMA; of what two splits have, the one that comes first here."""
        for prompt in prompts:
            self.tally["found"] += 1
            student, both = _digest(prompt.ids), _digest([prompt.ids, prompt.teacher_ids])
            if self.room is not None and len(prompt.teacher_ids) > self.room:
                self.tally["too_long"] += 1
                self.longest = max(self.longest, len(prompt.teacher_ids))
            elif self._split_of.setdefault(student, split) != split:
                self.tally["held_out"] += 1
            elif both in self._taken:
                self.tally["duplicate_prompts"] += 1
            else:
                self._taken.add(both)
                self.tally["prompts"] += 1
                yield {
                    "split": split,
                    "provenance": provenance(self.header, prompt.teacher_ids),
                    "prompt": prompt.text,
                    "ids": prompt.ids,
                    "teacher_ids": prompt.teacher_ids,
                }

    @property
    def counts(self) -> dict[str, int]:
        return {name: self.tally[name] for name in ("prompts", *_LEFT_OUT, SPELLINGS)}

    def summary(self) -> str:
        """What was left out, for a line; "" for nothing."""
        return ", ".join(f"{name.replace('_', ' ')} {self.tally[name]:,}" for name in _LEFT_OUT if self.tally[name])


def write_prompts(
    folder: Path,
    splits: Sequence[str],
    prompts: Callable[[str, Counter[str]], Iterable[Prompt]],
    chosen: Chosen,
) -> None:
    """FOLDER/prompts-SPLIT.parquet. `prompts`: of a split, counting in the tally it is given."""
    # What is held out comes first: a prompt that also stands in train is not learnt from.
    for split in sorted(splits, key=SPLITS.index, reverse=True):
        rows = chosen.of(split, prompts(split, chosen.tally))
        write_whole(folder / f"prompts-{split}.parquet", PROMPTS_SCHEMA, rows)


def read_prompts(folder: Path) -> pa.Table:
    """In the order of SPLITS."""
    return pa.concat_tables(pq.read_table(path) for path in _files(folder))


def keys_of(folder: Path) -> list[str]:
    """The provenance of each prompt, once, in the order of SPLITS."""
    columns = (pq.read_table(path, columns=["provenance"])["provenance"].to_pylist() for path in _files(folder))
    return list(dict.fromkeys(key for column in columns for key in column))


def _files(folder: Path) -> list[Path]:
    return [path for split in SPLITS if (path := folder / f"prompts-{split}.parquet").exists()]


def _digest(tokens: list[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).digest()
