"""Checks of what training stands on: ranks, memory, disk, tracker."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.training.checkpoint import share
from models.training.costs import peak_memory_gb
from models.training.saved import checkpoints, damage
from pipeline.doctor.findings import Finding, finding, skipped
from pipeline.training.settings import prepared_bytes

_ELEMENTS = 2**24  # of a collective, 64 MiB
_TURNS = 5


def collective(trainer: Any, device: torch.device, gradient_bytes: int) -> Finding:
    """Whether a sum over ranks is right on each, and how fast it is."""
    name, world = "collective", trainer.world_size
    if world == 1:
        return skipped(name, "one rank")
    sent = torch.empty(_ELEMENTS, device=device)
    seconds, wrong = float("inf"), 0
    for _ in range(_TURNS):
        sent.fill_(trainer.global_rank + 1)
        _wait(device)
        torch.distributed.barrier()
        began = time.perf_counter()
        torch.distributed.all_reduce(sent)
        _wait(device)
        seconds = min(seconds, time.perf_counter() - began)
        wrong += int((sent != world * (world + 1) // 2).sum())
    speed = 2 * (world - 1) / world * sent.numel() * 4 / seconds / 1e9
    told = f"{speed:.1f} GB/s a rank in an all-reduce"
    told += f"; {gradient_bytes / 1e9:.2f} GB of gradients in {_seconds(gradient_bytes, world, speed)}"
    told = f"{wrong:,} sums over ranks are wrong" if wrong else told
    remedy = "the ranks' network or NCCL is broken: run nccl-tests' all_reduce_perf on these nodes"
    return finding(name, not wrong, told, remedy)


def _seconds(gradient_bytes: int, world: int, speed: float) -> str:
    return f"{2 * (world - 1) / world * gradient_bytes / 1e9 / speed:.2g} s"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def digest(parameters: dict[str, Any]) -> dict[str, str]:
    """Of each parameter that a rank holds whole."""
    return {
        name: hashlib.blake2b(_bytes(each.detach()), digest_size=16).hexdigest()
        for name, each in parameters.items()
        if not hasattr(each, "ds_tensor")
    }


def _bytes(tensor: Tensor) -> Any:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def ranks_hold_the_same(of_ranks: list[dict[str, str]], steps: int) -> Finding:
    """After training steps on unlike text: gradients that were not summed over ranks leave them apart."""
    name = "gradients across ranks"
    if len(of_ranks) == 1:
        return skipped(name, "one rank")
    if not of_ranks[0]:
        return skipped(name, "no rank holds whole weights (ZeRO-3)")
    apart = [key for key in of_ranks[0] if len({each.get(key) for each in of_ranks}) > 1]
    more = f", {apart[0]} for one" if apart else ""
    measured = f"{len(apart)} of {len(of_ranks[0])} weights differ between ranks after {steps} steps{more}"
    remedy = (
        "gradients are not summed over ranks: the loss must go through the wrapped forward, and no parameter past it"
    )
    return finding(name, not apart, measured, remedy)


def moved(before: dict[str, str], after: dict[str, str]) -> Finding:
    """Whether training changes what it trains."""
    still = [name for name, hashed in before.items() if after.get(name) == hashed]
    if not before:
        return skipped("weights move", "no rank holds whole weights (ZeRO-3)")
    told = f"{len(before) - len(still)} of {len(before)} trained weights have changed"
    told += f"; {still[0]} has not, for one" if still else ""
    remedy = "they get no gradient: look at what is frozen, and at parameters that the loss does not reach"
    return finding("weights move", len(still) < len(before) / 2, told, remedy)


def checkpoint_reads_back(trainer: Any, module: Any, folder: Path) -> Finding:
    """The last one, of this rank, against what is in memory; to the bit."""
    from safetensors import safe_open

    name = "checkpoint"
    found = checkpoints(folder)
    remedy = f"the file system of {folder} does not give back what was written; choose another run_dir"
    if not found:
        return finding(name, False, f"none was written to {folder}", "leave the callback checkpoint in callbacks")
    began = time.perf_counter()
    if trainer.is_global_zero and (problem := damage(found[-1])) is not None:
        return finding(name, False, problem, remedy)
    mine = share(trainer, module, copied=False)
    path = found[-1] / f"rank-{trainer.global_rank:05d}.safetensors"
    wrong = []
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        for key, tensor in mine.values():
            if key not in names or not torch.equal(_flat(file.get_tensor(key)), _flat(tensor.cpu())):
                wrong.append(key)
    size, seconds = path.stat().st_size, time.perf_counter() - began
    told = f"{len(mine.tensors)} tensors, {size / 1e6:,.1f} MB a rank, read back to the bit in {seconds:.1f} s"
    return finding(name, not wrong, f"{len(wrong)} tensors differ, {wrong[0]} for one" if wrong else told, remedy)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def space(run_dir: Path, scratch: Path, keep: int, corpus: dict[str, Any], vocabulary: int) -> Finding:
    """For the checkpoints that are kept, one more that is being written, the start and the result, by what these took
    here; and for the whole prepared text, as the check counts it. `corpus`: what the plan says of the text. What the
    run has of it already is there to be used."""
    one = _size(checkpoints(scratch / "checkpoints")[-1:])
    start = _size([scratch / "start"])
    text = prepared_bytes(corpus, vocabulary)
    had = _size([scratch, run_dir / "work" / scratch.name, run_dir / "work" / "data"])
    needed, free = (keep + 1) * one + 2 * start + text, shutil.disk_usage(run_dir).free + had
    told = (
        f"{needed / 1e9:.3g} GB for {keep + 1} checkpoints, the start, the result and {text / 1e9:.3g} GB of prepared"
    )
    told += f" text; {free / 1e9:.3g} GB free"
    remedy = "choose another run_dir, or a smaller trainer.checkpoint.keep or data.max_documents"
    return finding("space", needed <= free, told, remedy)


def _size(folders: list[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.rglob("*") if path.is_file())


def memory(device: torch.device) -> Finding:
    """The most that was held in two steps, of what the device has."""
    held = peak_memory_gb(device)
    if device.type != "cuda":
        return Finding("memory", "ok", f"{held:.2f} GB of the host's at most")
    whole = torch.cuda.get_device_properties(device).total_memory / 1e9
    remedy = "a lower training.micro_batch, training.activation_checkpointing=true, or strategy=zero3"
    told = f"{held:.1f} of {whole:.1f} GB at most"
    return Finding("memory", "warning", told, remedy) if held > 0.95 * whole else Finding("memory", "ok", told)


def tracker_answers(tracker: Any) -> Finding:
    """Whether what the training logs will arrive; nothing is logged."""
    if not hasattr(tracker, "reachable"):
        return skipped("logger", "it writes files alone")
    fine, told = tracker.reachable()
    remedy = "run wandb login, let the machine reach the server, or set logger.mode=offline"
    return Finding("logger", "ok" if fine else "warning", told, "" if fine else remedy)
