"""A job's share of the text: shards that are made beside those of other jobs, before the run that reads them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.data.prepared import aside_of, folder_of, whole, writing
from pipeline.data.rendering import with_template
from pipeline.data.shards import Shards
from pipeline.data.source import DataSource


def prepare_share(
    data: DataSource, tokenizer: Any, teacher_tokenizer: Any, root: Path, share: tuple[int, int]
) -> list[str]:
    """Make every n-th shard of what trains, from the i-th on (`share` = (i, n), i from 1), of those that are not there.

    What is told is a line for each split. The run that reads the sequences makes what is still missing, and the index.
    """
    with_template(tokenizer, data)
    lines = []
    for split, other in (("train", teacher_tokenizer), ("validation", None)):
        folder = folder_of(data, split, tokenizer, root, other)
        with writing(folder, alone=False):
            lines.append(f"{split}: {_made(data, split, tokenizer, other, folder, share)}")
    return lines


def _made(
    data: DataSource, split: str, tokenizer: Any, teacher_tokenizer: Any, folder: Path, share: tuple[int, int]
) -> str:
    if folder.exists() and whole(folder):
        return "prepared already"
    if (parts := data.parts(split)) is None:
        raise Refusal(f"prepare_data: {data.node} is prepared in one go; leave prepare_data out")
    shards, aside = Shards(parts, tokenizer, data, teacher_tokenizer), aside_of(folder)
    mine = range(share[0] - 1, len(parts), share[1])
    missing = sorted({*mine} & {*shards.missing(aside)})
    shards.make_some(aside, missing, data.workers)
    return f"{len(missing):,} shards made, {len(mine):,} of {len(parts):,} are this job's"
