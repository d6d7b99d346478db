"""Which checkpoint a restarted stage goes on from."""

from __future__ import annotations

from pathlib import Path

from models.errors import Refusal
from models.training.saved import checkpoints, damage, step_of
from pipeline.context import Context


def folder_of(context: Context) -> Path:
    return context.work / "checkpoints"


def check(context: Context) -> None:
    """Refuse what cannot be gone on from; reads no weights."""
    folder = folder_of(context)
    if older := sorted(folder.glob("step-*.ckpt")):
        raise Refusal(
            f"{older[-1]}: it was saved by an earlier version, and does not open here; finish the stage with "
            f"that version, or remove {folder} to begin it anew"
        )


def choose(context: Context) -> Path | None:
    """The newest checkpoint that is whole, None where there is none. Damaged ones are told, and passed over. Reads all
    of the checkpoint, in one process."""
    folder = folder_of(context)
    found = checkpoints(folder)
    since = context.turns[-1]["step"] if context.turns else 0
    for path in reversed(found):
        if step_of(path) < since:
            break
        if (problem := damage(path)) is None:
            return path
        print(f"{context.stage}: {path} is damaged and passed over: {problem}", flush=True)
    if found:
        wanted = f" from step {since} on" if since else ""
        raise Refusal(
            f"{folder}: no checkpoint{wanted} is whole; restore one, or remove the folder to begin the stage anew"
        )
    return None
