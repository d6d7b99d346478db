"""A job's share of the text: shards that are made beside those of other jobs, before the run that reads them all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from models.errors import Refusal
from pipeline.data.prepared import aside_of, folder_of, whole
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
        if folder.exists() and whole(folder):
            lines.append(f"{split}: prepared already")
            continue
        if (parts := data.parts(split)) is None:
            raise Refusal(f"prepare_data: {data.node} is prepared in one go; leave prepare_data out")
        shards, aside = Shards(parts, tokenizer, data, other), aside_of(folder)
        mine = range(share[0] - 1, len(parts), share[1])
        missing = sorted({*mine} & {*shards.missing(aside)})
        shards.make_some(aside, missing, data.workers)
        lines.append(f"{split}: {len(missing):,} shards made, {len(mine):,} of {len(parts):,} are this job's")
    return lines
