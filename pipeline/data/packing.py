"""Documents → rows: tokenize, cut into pieces, fill rows with pieces.

A row holds lists of one length, at most `max_length`:

    input_ids      int32
    position_ids   int32, from 0 again with every piece
    targets        int32, the next token of the same piece, or -100 where there is none or it is not supervised
    supervised     how many targets are not -100
    bytes          of the text, in UTF-8, that the supervised targets stand for

A piece is a window of a text, or a conversation. A text is begin + tokens + end; its windows overlap by one token,
so that everything after begin is a target exactly once. A conversation is never cut into windows, only off.
"""

from __future__ import annotations

import json
import os
import shutil
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from models.errors import Refusal
from pipeline.data.corpora import Conversation, Data, empty_documents

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
STATISTICS = "statistics.json"

Ints = NDArray[np.int64]


def prepare(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, data: Data, *, folder: Path
) -> tuple[Dataset, dict[str, Any]]:
    """The rows of `documents` (a column `text` or `messages`), memory mapped from `folder`, and their statistics.

    A folder that is there is whole and is only opened. Otherwise it is written aside and renamed; of several
    processes that ask at once, the first writes and the others wait for it.
    """
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            with _progress(len(documents) > 100_000):
                _build(documents, tokenizer, data, aside)
            os.rename(aside / "rows", folder)
            shutil.rmtree(aside)
    return prepared(folder)
