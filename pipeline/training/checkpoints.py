"""Which checkpoint a restarted stage goes on from."""

from __future__ import annotations

from pathlib import Path

from models.errors import Refusal


def last_checkpoint(folder: Path, sharded: bool, world: int) -> str | None:
    """The newest whole checkpoint, or None; refuses one that this topology cannot open."""
    found = sorted(folder.glob("step-*.ckpt"))
    if not found:
        return None
    saved_by = len(list(found[-1].glob("checkpoint/*optim_states.pt")))  # ZeRO saves a folder, a file for every rank
    if found[-1].is_dir() != sharded or (sharded and saved_by != world):
        how = f"{saved_by} ranks under ZeRO" if found[-1].is_dir() else "strategy=single or ddp"
        raise Refusal(
            f"{found[-1]} was saved by {how}, and this is {world} ranks {'under ZeRO' if sharded else 'without'}; go "
            f"on with the old strategy and devices, or remove {folder} to start the stage anew"
        )
    return str(found[-1])
