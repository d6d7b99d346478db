"""The forecast as a table and sentences."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.forecast.memory import PARTS
from pipeline.report.units import duration, si, size

Json = dict[str, Any]

_MEMORY = (*(f"{part}_bytes" for part in PARTS), "kv_cache_bytes")  # at the fullest moment


def table(config: Json, rows: list[Json]) -> Table:
    """A column for each stage: memory of one rank, then the whole run."""
    said = config["forecast"]
    made = Table(
        title=Text(f"{config['name']}, forecast for {_gpus(rows, said)}"), title_justify="left", box=box.SIMPLE_HEAD
    )
    made.add_column("")
    shown = [row for row in rows if "device_bytes" in row]
    for row in shown:
        made.add_column(Text(row["stage"]), justify="right")
    for name, cells in _cells(shown):
        if any(cell not in ("", "0 B") for cell in cells):
            made.add_row(name, *cells)
    return made


def _gpus(rows: list[Json], said: Json) -> str:
    count = max((row.get("gpus", 1) for row in rows), default=1)
    return f"{count} × {said['gpu']}"


def _cells(rows: list[Json]) -> list[tuple[str, list[str]]]:
    def of(name: str, show: Any) -> list[str]:
        return ["" if row.get(name) is None else show(row[name]) for row in rows]

    usable = next((row["usable_bytes"] for row in rows if row.get("usable_bytes")), None)
    limit = "" if usable is None else f" (of {size(usable)} usable)"
    return [
        ("parameters", of("parameters", si)),
        ("strategy", of("strategy", str)),
        ("GPUs", of("gpus", str)),
        ("micro-batch", of("micro_batch", str)),
        (f"memory of a GPU{limit}", [f"{size(row['device_bytes'])}{'' if row['fits'] else ' !'}" for row in rows]),
        *((f"  {name.removesuffix('_bytes').replace('_', ' ')}", of(name, size)) for name in _MEMORY),
        ("loss engine at work", of("loss_bytes", size)),
        ("largest micro-batch", of("largest_micro_batch", str)),
        ("choose", of("choose", lambda it: f"{it['strategy']}, {it['micro_batch']}")),
        ("host memory of a rank", of("host_bytes", size)),
        ("host memory of a node", of("node_host_bytes", size)),
        ("checkpoints on disk", of("checkpoint_bytes", size)),
        ("result on disk", of("result_bytes", size)),
        ("prepared text on disk", of("data_bytes", size)),
        ("tokens", of("tokens", si)),
        ("FLOPs", of("flops", lambda it: f"{it:.2e}")),
        ("tokens/s", of("tokens_per_second", si)),
        ("time", of("seconds", duration)),
        ("time of writing", of("writing_seconds", duration)),
        ("GPU-hours", of("gpu_hours", lambda it: f"{it:,.1f}")),
    ]


def lines(config: Json, rows: list[Json]) -> list[str]:
    """What to change, and what the figures are."""
    said = config["forecast"]
    notes = [f"{row['stage']}: {note}" for row in rows for note in row["notes"]]
    hours = sum(row.get("gpu_hours") or 0 for row in rows)
    unknown = [row["stage"] for row in rows if "device_bytes" in row and row.get("gpu_hours") is None]
    if hours:
        left = f", without {', '.join(unknown)}" if unknown else ""
        notes.append(f"in all {hours:,.0f} GPU-hours{left}")
    notes.append(
        "memory is traced from the model's own code (exact: parameters, gradients, optimizer; of buffers that CUDA, "
        "NCCL and kernels take for themselves it knows nothing, hence forecast.usable_memory="
        f"{said['usable_memory']:g}); time assumes {said['efficiency']:.0%} of the GPU's peak "
        "(forecast.efficiency; Llama 3 reached 38 to 43 %, arXiv:2407.21783), which slow links between nodes lower"
    )
    return notes
