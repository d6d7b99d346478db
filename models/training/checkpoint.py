"""Checkpoints of a training: safetensors and JSON, verified by hash, and taken up under any topology.

    step-00000040/
      rank-00000.safetensors   one file a rank: pieces of flattened parameters and of the optimizer's state
      rank-00000.json          its size and hash, written when the file is whole
      checkpoint.json          step, topology, what the module counts, and the files: written last of all

The folder has another name until it is whole. Of a parameter NAME a file holds `NAME|START|value`, `NAME|START|KEY` for
each of the optimizer's tensors of that shape, and `NAME|KEY` for what the optimizer holds of it as a whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor, nn

from models.dtypes import name_of
from models.errors import Refusal
from models.files import hash_of, remove, sync, write_json
from models.training.pieces import Piece, make_room, pieces, refresh
from models.training.saved import HEAD, read_head

_VALUE = "value"
_POLL_SECONDS = 0.05
FAILED = ".failed"  # in place of .json, of a rank that could not write its part


class Trained(Protocol):
    """What a checkpoint asks of a module."""

    def trained_by_name(self) -> dict[str, nn.Parameter]:
        """In one order on every rank, under every strategy."""
        ...

    def so_far(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What it counts, as JSON, and tensors beside its parameters; the same on every rank."""
        ...

    def go_on(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take up both again."""
        ...


@dataclass(frozen=True)
class Share:
    """A rank's part of a checkpoint."""

    rank: int
    world: int
    tensors: dict[str, Tensor]  # what is on NVMe is on the meta device here
    head: dict[str, Any]
    finite: bool = True  # all trained values of this rank
    borrowed: Callable[[], Iterator[dict[str, Tensor]]] | None = None  # brings in what is on NVMe, in the same order

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """Each with its numbers, which are gone when the next is asked for."""
        borrowed, at_hand = self.borrowed() if self.borrowed is not None else iter(()), dict[str, Tensor]()
        for name, tensor in self.tensors.items():
            while tensor.is_meta and name not in at_hand:
                at_hand = next(borrowed)
            yield name, at_hand[name].detach() if tensor.is_meta else tensor
        next(borrowed, None)  # gives back what came last


def share(trainer: Any, module: Any, *, copied: bool) -> Share:
    """This rank's part, of now. `copied`: in host memory, so that training may go on while it is written. What is on
    NVMe is not: it is to be written before training goes on, and read a second time for that."""
    rank, world = trainer.global_rank, trainer.world_size
    numbers, others = module.so_far()
    optimizer, trained = trainer.optimizers[0], module.trained_by_name()
    tensors: dict[str, Tensor] = {}
    sharded = hasattr(optimizer, "optimizer")
    finite, borrowed = True, False
    for turn, piece in enumerate(pieces(optimizer, trained)):
        finite = finite and bool(torch.isfinite(piece.values).all())
        if not sharded and turn % world != rank:  # what every rank holds, one of them writes
            continue
        named = {name: tensor.detach() for name, tensor in _named(piece).items()}
        if piece.borrowed:
            borrowed = True
            named = {name: tensor.to("meta") for name, tensor in named.items()}
        elif copied:
            named = {name: tensor.to("cpu", copy=True) for name, tensor in named.items()}
        tensors |= named
    if rank == 0:
        tensors |= {f"|{name}": tensor.detach().to("cpu", copy=True) for name, tensor in others.items()}
    strategy = getattr(trainer.strategy, "config", None) or {}
    stage = (strategy.get("zero_optimization") or {}).get("stage") if sharded else None
    head = {"step": trainer.global_step, "ranks": world, "zero_stage": stage, "so_far": numbers}

    def again() -> Iterator[dict[str, Tensor]]:
        return (_named(piece) for piece in pieces(optimizer, trained) if piece.borrowed)

    return Share(rank, world, tensors, head, finite, again if borrowed else None)


def write(mine: Share, aside: Path) -> None:
    """This rank's file, and when it is whole and synced its size and hash beside it."""
    aside.mkdir(parents=True, exist_ok=True)
    path = aside / f"rank-{mine.rank:05d}.safetensors"
    digest, offset, header = hashlib.sha256(), 0, {}
    for name, tensor in mine.tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": name_of(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    # Not safetensors' own writer, which takes a second copy of everything; the format is a header and the bytes.
    told = json.dumps(header).encode()
    told += b" " * (-len(told) % 8)
    with open(path, "wb") as handle:
        for part in _parts(told, mine):
            digest.update(part)
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())
    entry = {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    _write_json(path.with_suffix(".json"), entry)


def finish(mine: Share, aside: Path, final: Path, given_up: threading.Event) -> None:
    """On one rank: wait until every rank has written its file, and give the folder its name. Raises where a rank could
    not, where the process is ending, and where it is `given_up` meanwhile."""
    told = [aside / f"rank-{rank:05d}.json" for rank in range(mine.world)]
    while not all(path.exists() for path in told):
        failed = any(path.with_suffix(FAILED).exists() for path in told)
        if failed or not threading.main_thread().is_alive() or given_up.wait(_POLL_SECONDS):
            raise RuntimeError(f"{aside}: not every rank has written its part")
    files = [json.loads(path.read_text()) for path in told]
    _write_json(aside / HEAD, {**mine.head, "files": files})
    sync(aside)
    remove(final)
    os.rename(aside, final)
    sync(final.parent)


def restore(trainer: Any, module: Any, checkpoint: Path) -> None:
    """Take up a training where `checkpoint` left it, whatever the topology then and now. Every rank must call it, once
    its strategy is set up and before the first batch is asked for."""
    head = read_head(checkpoint)
    optimizer, trained = trainer.optimizers[0], module.trained_by_name()
    with _Reader(checkpoint, head) as saved:
        if missing := sorted(trained.keys() ^ saved.names):
            raise Refusal(
                f"{checkpoint}: it was saved of another model ({missing[0]} and {len(missing) - 1} more differ); "
                f"begin anew with resume=overwrite"
            )
        make_room(optimizer, trained, saved.state, {name: saved.numbers(name) for name in trained})
        with torch.no_grad():
            for piece in pieces(optimizer, trained, changed=True):
                piece.values.copy_(saved.stretch(piece.name, _VALUE, piece.start, piece.values.numel()))
                for key, tensor in piece.state.items():
                    tensor.copy_(saved.stretch(piece.name, key, piece.start, tensor.numel()))
        module.go_on(head["so_far"], saved.others())
    refresh(optimizer)
    _count_from(trainer, head["step"])


def _count_from(trainer: Any, step: int) -> None:
    """Lightning's counters and the schedule as they are after `step` steps. Micro-batches are counted as they are
    now."""
    loop = trainer.fit_loop.epoch_loop
    stepped = loop.automatic_optimization.optim_progress.optimizer
    for counter in (stepped.step.total, stepped.zero_grad.total):
        counter.ready = counter.completed = step
    stepped.zero_grad.total.started = step
    batches = loop.batch_progress.total
    batches.ready = batches.started = batches.processed = batches.completed = step * trainer.accumulate_grad_batches
    loop._batches_that_stepped = step
    for config in trainer.lr_scheduler_configs:
        config.scheduler.optimizer._opt_called = True  # torch warns where a schedule steps before its optimizer
        for _ in range(step):
            config.scheduler.step()


class _Reader:
    """Stretches of parameters out of the files of all ranks."""

    def __init__(self, checkpoint: Path, head: Mapping[str, Any]) -> None:
        self._paths = [checkpoint / Path(entry["name"]).name for entry in head["files"]]
        self.names: set[str] = set()
        self.state: dict[str, set[str]] = {}
        self._stretches: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = {}
        self._numbers: dict[tuple[str, str], tuple[Any, str]] = {}
        self._others: dict[str, Tensor] = {}

    def __enter__(self) -> _Reader:
        self._files = [safe_open(path, "pt") for path in self._paths]
        for file in self._files:
            for key in file.keys():
                name, *start, what = key.split("|")
                if not name:
                    self._others[what] = file.get_tensor(key)
                elif not start:
                    self._numbers[name, what] = (file, key)
                else:
                    numel = file.get_slice(key).get_shape()[0]
                    self._stretches.setdefault((name, what), []).append((int(start[0]), numel, file, key))
                    self.names.add(name)
                    if what != _VALUE:
                        self.state.setdefault(name, set()).add(what)
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def others(self) -> dict[str, Tensor]:
        return self._others

    def numbers(self, name: str) -> dict[str, Tensor]:
        return {key: file.get_tensor(full) for (of, key), (file, full) in self._numbers.items() if of == name}

    def stretch(self, name: str, what: str, start: int, numel: int) -> Tensor:
        """[numel] of a flattened parameter, or of a tensor of the optimizer's."""
        parts = []
        at = start
        for begin, length, file, key in sorted(self._stretches[name, what], key=lambda found: found[0]):
            if begin <= at < begin + length and at < start + numel:
                end = min(begin + length, start + numel)
                parts.append(file.get_slice(key)[at - begin : end - begin])
                at = end
        if at != start + numel:
            raise Refusal(f"the checkpoint lacks {name} from element {at} on; remove it to go on from the one before")
        return torch.cat(parts)


def _named(piece: Piece) -> dict[str, Tensor]:
    begin = f"{piece.name}|{piece.start}"
    return {
        f"{begin}|{_VALUE}": piece.values,
        **{f"{begin}|{key}": tensor for key, tensor in piece.state.items()},
        **{f"{piece.name}|{key}": tensor for key, tensor in piece.numbers.items()},
    }


def _parts(header: bytes, mine: Share) -> Iterator[Any]:
    """The bytes of a safetensors file, in order; one tensor at a time leaves its device."""
    yield len(header).to_bytes(8, "little")
    yield header
    for _, tensor in mine.values():
        yield tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """With a hash of itself, which `read_head` looks at."""
    write_json(path, {**value, "sha256": value.get("sha256") or hash_of(value)})
