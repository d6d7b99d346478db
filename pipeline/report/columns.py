"""The report's columns: what each is called, and how its figures are written. Model cards show the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from pipeline.report import units

Json = dict[str, Any]


class Column(NamedTuple):
    key: str
    heading: str
    short: str  # for a terminal of 80 columns
    show: Callable[[Any], str]


def _fixed(decimals: int) -> Callable[[float | None], str]:
    return lambda value: units.NOTHING if value is None else f"{value:.{decimals}f}"


COLUMNS = (
    Column("parameters", "parameters", "params", units.si),
    Column("bytes", "on disk", "disk", units.size),
    Column("perplexity", "test perplexity", "test\nppl", units.score),
    Column("perplexity_interval", "95 % interval", "95 %", units.interval),
    Column("bits_per_byte", "bits per byte", "bits/\nbyte", _fixed(3)),
    Column("generate_tokens_per_second", "generate tokens/s", "gen.\ntok/s", units.si),
    Column("prefill_tokens_per_second", "prefill tokens/s", "prefill\ntok/s", units.si),
    Column("first_token_ms", "first token (ms)", "first\ntoken\nms", _fixed(1)),
    Column("peak_memory_bytes", "peak memory", "peak\nmem.", units.size),
    Column("seconds", "time spent", "time", units.duration),
    Column("tokens", "tokens spent", "tokens", units.si),
)
# Shown where a task was evaluated.
TASK_COLUMNS = (
    Column("accuracy", "accuracy", "acc.", _fixed(3)),
    Column("accuracy_interval", "95 % interval of accuracy", "95 %", units.shares),
    Column("accuracy_on_training_queries", "accuracy on training queries", "acc.\ntrain", _fixed(3)),
    Column("gap_closed", "gap closed", "gap\nclosed", _fixed(3)),
    Column("gap_closed_low", "gap closed, 2.5th percentile", "low", _fixed(3)),
    Column("gap_closed_high", "gap closed, 97.5th percentile", "high", _fixed(3)),
    Column("gap_closed_on_training_queries", "gap closed on training queries", "gap\ntrain", _fixed(3)),
)
# Shown where a model has zeros in place (stage sparsify), with a note on what they are good for.
ZEROS = Column(
    "zeros", "zeros in weight matrices", "zeros", lambda v: units.NOTHING if v is None else f"{100 * v:.1f} %"
)
ZEROS_NOTE = (
    "Zeros in place save neither time nor memory in dense runtimes (transformers, vLLM's dense kernels, llama.cpp). "
    "2:4 can be faster with sparse kernels on NVIDIA GPUs since Ampere. Structured pruning (stage prune) makes a "
    "model smaller and faster everywhere."
)
# The size of the key-value cache, shown where it differs between models.
CACHE = Column("cache_bytes_per_token", "cache bytes per token", "cache\nB/tok", units.si)
# Shown for exports: how many bits a weight takes, its scales included, and which runtime measured the figures.
BITS = Column("bits_per_weight", "bits per weight", "bits/\nweight", _fixed(2))
RUNTIME = Column("runtime", "measured by", "by", lambda value: units.NOTHING if value is None else str(value))
FIELDS = ("stage", "path", *(column.key for column in COLUMNS), "documents")


def columns_of(rows: Sequence[Json]) -> list[Column]:
    """The report's own columns that have a figure, then one for each further key of the rows."""
    extra = dict.fromkeys(key for row in rows for key in row if key not in FIELDS)
    task = [column for column in TASK_COLUMNS if extra.pop(column.key, 0) is None]
    own = {column.key: column for column in (ZEROS, CACHE, BITS, RUNTIME) if extra.pop(column.key, 0) is None}
    return [
        *(column for column in COLUMNS if any(row.get(column.key) is not None for row in rows)),
        *([CACHE] if len({row[CACHE.key] for row in rows if row.get(CACHE.key)}) > 1 else []),
        *([ZEROS] if notes_on(rows) else []),
        *(column for column in (BITS, RUNTIME) if column.key in own),
        *task,
        *(Column(key, key.replace("_", " "), key.replace("_", " "), plain) for key in extra),
    ]


def notes_on(rows: Sequence[Json]) -> list[str]:
    """What a reader of the table could misunderstand."""
    return [ZEROS_NOTE] if any(row.get(ZEROS.key) for row in rows) else []


def plain(value: Any) -> str:
    if not isinstance(value, float):
        return units.NOTHING if value is None else str(value)
    return f"{value:.2e}" if 0 < abs(value) < 0.001 else units.score(value)
