"""Calibration text for pruning: batches of it, and the statistics by which units are scored."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from models.errors import Refusal
from models.pruning import importance as scoring
from models.pruning.files import read_partial_scores, read_scores, write_partial_scores
from models.pruning.groups import Anatomy
from models.pruning.importance import Batch, Importance, Statistics
from models.pruning.surgery import Kept, silent_experts
from models.targets import IGNORED
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.batch import blank, collate, pad_token
from pipeline.data.calibration import Calibration
from pipeline.data.prepared import sequences_of
from pipeline.data.sequences import Sequences
from pipeline.data.source import DataSource
from pipeline.progress import shown
from pipeline.training.ranks import beat

_PREPARED = "prepared.json"


def prepare_text(context: Context, data: DataSource, tokenizer: Any) -> None:
    """Packs both splits; one process, before the ranks. Raises Refusal where the training split is empty."""
    context.work.mkdir(parents=True, exist_ok=True)
    folders = {}
    for split in ("train", "validation"):
        sequences, _, folder = sequences_of(data, split, tokenizer, context.data_folder)
        folders[split] = str(folder) if len(sequences) else None
    if folders["train"] is None:
        raise Refusal(
            f"{context.stage}: no sequence of data.train is left after tokenizing; there is no calibration text"
        )
    artifact.write_json(context.work / _PREPARED, folders)


@dataclass(frozen=True)
class CalibrationText:
    """What `prepare_text` left."""

    context: Context
    tokenizer: Any
    seed: int

    def batches(
        self,
        split: str,
        calibration: Calibration,
        rank: int = 0,
        world: int = 1,
        place: torch.device | str = "cpu",
    ) -> list[Batch]:
        """Samples of a split, this rank's part of them; the same for the same seed."""
        folder = json.loads((self.context.work / _PREPARED).read_text())[split]
        if folder is None:
            return []
        draw = np.random.default_rng([self.seed, *split.encode()])
        samples = calibration.take(self.context.stage, Sequences(folder), draw)
        if not samples:
            raise Refusal(
                f"{self.context.stage}: no sequence of data.{split} has a token to predict, on which units are scored"
            )
        names = list(samples[0])
        batches = []
        for first in range(0, len(samples), calibration.batch_size):
            mine = samples[first : first + calibration.batch_size][rank::world]
            padding = pad_token(self.tokenizer)
            batch = collate(mine or [blank(names, padding)], pad_token=padding)
            batches.append({name: batch[name].to(place) for name in names})
        return batches


@dataclass(frozen=True)
class Scoring:
    """Statistics for an importance: gathered on calibration text, or added up from files of earlier runs."""

    context: Context
    importance: Importance
    kinds: Sequence[str]

    def gather(self, model: Any, anatomy: Anatomy, kept: Kept, batches: list[Batch], step: int) -> Statistics:
        """Over all ranks; continued where a killed run was. Experts outside of `kept` are never chosen."""
        path = self.context.work / f"{step}.{artifact.SCORES}"
        before, done = read_partial_scores(path, self.context.fingerprint)
        first_rank = self.context.rank == 0
        if first_rank:  # of several ranks, its share; there can be less text than was asked for
            samples, tokens = (
                sum(int(each.sum()) for each in some) for some in zip(*map(_counts, batches), strict=True)
            )
            print(f"{self.context.stage}: scoring on {samples:,} samples with {tokens:,} tokens to predict", flush=True)

        def after(statistics: Statistics) -> None:
            nonlocal done
            done += 1
            beat()
            if first_rank:
                write_partial_scores(path, statistics, self.context.fingerprint, done)

        left = shown(batches[done:], len(batches) - done, "scoring", first_rank and len(batches) - done > 1)
        with silent_experts(model, anatomy, kept):
            return scoring.gather(self.importance, model, anatomy, self.kinds, left, before, after)

    def write(self, statistics: Statistics, path: Path) -> None:
        save_file(statistics, path, metadata={"of": json.dumps(self._subject)})

    def check(self, files: Sequence[Path]) -> None:
        """Raises Refusal for files whose statistics cannot be added up to those of this model and importance."""
        for path in files:
            self._check(path, read_scores(path)[1])

    def added(self, files: Sequence[Path]) -> Statistics:
        total: Statistics = {}
        for path in files:
            statistics, of = read_scores(path)
            self._check(path, of)
            total = {name: total[name] + values if total else values for name, values in statistics.items()}
        return total

    @property
    def _subject(self) -> dict[str, Any]:
        """What has to be equal for statistics to be added up."""
        importance = self.context.config["stages"][self.context.stage]["importance"]
        model = self.context.parents.get("model", {}).get("content_hash")  # None in the check
        importance = {name: value for name, value in importance.items() if name != "reduction"}  # of what is gathered
        return {"model": model, "importance": importance, "kinds": sorted(self.kinds)}

    def _check(self, path: Path, of: dict[str, Any]) -> None:
        if odd := [name for name, value in self._subject.items() if value is not None and of.get(name) != value]:
            raise Refusal(f"prune.scores={path}: these are of another {odd[0]}; score this one's text anew")


def _counts(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Samples that predict something, and tokens to predict."""
    real_BT = batch["targets"] != IGNORED
    return real_BT.any(1), real_BT
