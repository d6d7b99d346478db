"""Which sequences make up which optimizer step, on which rank: one endless order, the same for every topology."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset, Sampler

from models.errors import Refusal
from pipeline.data.batch import blank, collate

_BLANK = -1


@dataclass(frozen=True)
class MicroBatch:
    """The sequences one rank works on at once, and the totals of the optimizer step they belong to."""

    sequences: list[int]
    step_tokens: float  # supervised tokens of the step, over all ranks and micro-batches; with weights, their sum
    tokens_of_step: int  # all its tokens, padding left out


class Order(Sampler[MicroBatch]):
    """Epoch after epoch of seeded permutations, in steps of `global_batch` sequences; a step may straddle epochs.

    The sequences of step k depend on the seed alone. So accumulation, rank count and a restart at any step change
    nothing, and every rank can count the tokens of the whole step by itself. `supervised` is what each sequence counts:
    whole numbers of tokens, or sums of their weights. `skipped` (sequence → step): from that step on a blank sequence
    stands in its place.
    """

    def __init__(
        self,
        supervised: np.ndarray,
        lengths: np.ndarray,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        first_step: int = 0,
        skipped: Mapping[int, int] | None = None,
    ) -> None:
        self.skipped = skipped or {}
        self.supervised, self.lengths, self.seed = supervised, lengths, seed
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.first_step = first_step

    def step_sequences(self, step: int) -> np.ndarray:
        """Numbers of the sequences of optimizer step `step`."""
        count = len(self.supervised)
        wanted = np.arange(step * self.global_batch, (step + 1) * self.global_batch)
        return np.concatenate(
            [self._permutation(int(e))[wanted[wanted // count == e] % count] for e in np.unique(wanted // count)]
        )

    def read_between(self, numbers: Collection[int], first_step: int, end_step: int) -> set[int]:
        """Of the sequences `numbers` those that the optimizer steps from `first_step` up to `end_step` read."""
        count, found = len(self.supervised), set[int]()
        begin, end = first_step * self.global_batch, end_step * self.global_batch
        for epoch in range(begin // count, -(-end // count)):
            read = self._permutation(epoch)[max(0, begin - epoch * count) : end - epoch * count]
            found |= {*np.intersect1d(read, list(numbers)).tolist()}
            if len(found) == len(set(numbers)):
                break
        return found

    def step_length(self, step: int) -> int:
        return int(self.lengths[self.step_sequences(step)].sum())

    def _permutation(self, epoch: int) -> np.ndarray:
        cached = getattr(self, "_cached", None)
        if cached is None or cached[0] != epoch:
            self._cached = (epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.supervised)))
        return self._cached[1]

    def __iter__(self) -> Iterator[MicroBatch]:
        step = self.first_step
        while True:
            sequences = self.step_sequences(step)
            blanks = [self.skipped.get(number, step + 1) <= step for number in sequences.tolist()]
            tokens, length = self.supervised[sequences].sum().item(), int(self.lengths[sequences].sum())
            tokens -= self.supervised[sequences[blanks]].sum().item()
            length -= int(self.lengths[sequences[blanks]].sum())
            tokens = tokens if tokens > 0 else 1  # all of the step skipped: its sum is 0, and is divided all the same
            sequences = np.where(blanks, _BLANK, sequences)
            for begin in range(self.rank * self.micro_batch, self.global_batch, self.world * self.micro_batch):
                yield MicroBatch(sequences[begin : begin + self.micro_batch].tolist(), tokens, length)
            step += 1


class _Collated(Dataset[dict[str, Any]]):
    def __init__(self, sequences: Any, pad_token: int, length: int | None, side: str) -> None:
        self.sequences, self.pad_token, self.length, self.side = sequences, pad_token, length, side

    def __getitem__(self, micro: MicroBatch) -> dict[str, Any]:
        sequences = [self.sequences.arrays(number) for number in micro.sequences if number != _BLANK]
        sequences += [blank(self.sequences.column_names, self.pad_token)] * (len(micro.sequences) - len(sequences))
        return collate(sequences, pad_token=self.pad_token, length=self.length, side=self.side) | {
            "step_tokens": micro.step_tokens,
            "tokens_of_step": micro.tokens_of_step,
            "sequences": micro.sequences,
        }


class PackedSequences(pl.LightningDataModule):
    """Sequences → batches of a rank. `length` pads every batch to one width (None: to its longest sequence)."""

    def __init__(
        self,
        train: Any,
        validation: Any | None,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        pad_token: int,
        length: int | None,
        workers: int = 0,
        side: str = "right",
        skipped: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.skipped = skipped
        self.train, self.validation = train, validation
        self.seed, self.global_batch, self.micro_batch = seed, global_batch, micro_batch
        self.pad_token, self.length, self.workers, self.side = pad_token, length, workers, side
        self.supervised, self.lengths = train.counts, train.lengths

    def order(self, rank: int = 0, world: int = 1, first_step: int = 0) -> Order:
        return Order(
            self.supervised,
            self.lengths,
            seed=self.seed,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            rank=rank,
            world=world,
            first_step=first_step,
            skipped=self.skipped,
        )

    def steps(self, *, max_steps: int | None, max_tokens: int | None, epochs: float | None) -> int:
        """Optimizer steps until the first of the limits that is set."""
        limits = []
        if max_steps is not None:
            limits.append(max_steps)
        if epochs is not None:
            limits.append(int(np.ceil(epochs * len(self.supervised) / self.global_batch)))
        if max_tokens is not None:
            order, seen, step = self.order(), 0, 0
            while seen < max_tokens:
                seen += order.step_length(step)
                step += 1
            limits.append(step)
        return max(1, min(limits))

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        order = self.order(self.trainer.global_rank, self.trainer.world_size, first_step=self.trainer.global_step)
        return self._loader(self.train, order)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if self.validation is None:
            return []
        assert self.trainer is not None
        return self._loader(
            self.validation,
            in_turn(len(self.validation), self.micro_batch, self.trainer.global_rank, self.trainer.world_size),
        )

    def _loader(self, sequences: Any, sampler: Any) -> DataLoader[Any]:
        return DataLoader(
            _Collated(sequences, self.pad_token, self.length, self.side),
            sampler=sampler,
            batch_size=None,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )


def in_turn(count: int, micro_batch: int, rank: int, world: int) -> list[MicroBatch]:
    """Every sequence once, and as many batches on every rank: one that ran out would leave the others waiting for ever.

    Where the sequences do not divide, a rank's last place is filled by a blank one (-1).
    """
    mine = list(range(rank, count, world))
    mine += [_BLANK] * (-(-count // world) - len(mine))
    return [MicroBatch(mine[i : i + micro_batch], 0, 0) for i in range(0, len(mine), micro_batch)]


def accumulation(global_batch: int, micro_batch: int, world: int) -> int:
    """Micro-batches per rank and optimizer step."""
    if global_batch % (micro_batch * world):
        fitting = [m for m in range(1, global_batch + 1) if global_batch % (m * world) == 0]
        raise Refusal(
            f"training.global_batch={global_batch} is not a multiple of training.micro_batch={micro_batch} × {world} "
            f"ranks; "
            + (
                f"micro_batch can be {', '.join(map(str, fitting))}"
                if fitting
                else f"make global_batch a multiple of {world}"
            )
        )
    return global_batch // (micro_batch * world)
