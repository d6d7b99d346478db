"""A teacher that fits no single device: sharded over the ranks by an engine of its own, whatever the student's."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models import nvme
from models.errors import Refusal
from models.generation import Answer, Sampling, generate, log_probabilities
from models.heads import check_split, head_of, hidden_states
from models.load import DTYPES, empty_model, load_config
from models.objectives.representation import Wanted
from models.objectives.signal import Signal
from models.objectives.term import Objective
from models.sharding import engine_of, gathered, load_sharded, zero3
from models.teachers.teacher import Looked, Opening, Prefix, Result, Source, Teacher, look_through, prefix_of, signal_of

OFFLOADS = ("none", "cpu", "nvme")


@dataclass(frozen=True)
class Sharded(Source):
    """DeepSpeed ZeRO-3 for inference: every rank holds a share of each weight, gathered layer by layer.

    `offload` moves the shares to host memory or to `nvme_path` (ZeRO-Inference), so that even one small GPU, or none,
    runs a large teacher, at the speed of the bus. The engine is the teacher's alone: the student may train under any
    strategy, and none of it is in the student's checkpoint.
    """

    path: str
    dtype: str = "float32"
    trust_remote_code: bool = False
    offload: str = "none"
    nvme_path: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"teacher.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if self.offload not in OFFLOADS:
            raise Refusal(f"teacher.offload={self.offload}: need one of {', '.join(OFFLOADS)}")
        if self.offload == "nvme" and not self.nvme_path:
            raise Refusal("teacher.offload=nvme: give teacher.nvme_path, a folder on a local NVMe disk")

    def check(self, objective: Objective) -> None:
        """It serves all of them."""

    def open(self, opening: Opening) -> Teacher:
        return _ShardedTeacher(self, opening)

    def check_disk(self, config: Any, ranks: int, here: int, key: str = "teacher") -> None:
        """Refuse a folder for its shares that cannot take those of `here` of the ranks, which run on this machine.
        `config`: the model's; `key`: of these settings."""
        if self.offload == "nvme" and self.nvme_path is not None:
            largest = self._shares(config, ranks)[1]
            locked = nvme.BUFFERS * DTYPES[self.dtype].itemsize * largest
            nvme.check(self.nvme_path, f"{key}.nvme_path", disk=self.disk_bytes(config, ranks, here), locked=locked)

    def disk_bytes(self, config: Any, ranks: int, here: int) -> int:
        """That `here` of the ranks put into `nvme_path`."""
        if self.offload != "nvme":
            return 0
        return DTYPES[self.dtype].itemsize * self._shares(config, ranks)[0] * here

    def _shares(self, config: Any, ranks: int) -> tuple[int, int]:
        """Elements of a rank's share, and of its largest weight's."""
        sizes = [each.numel() for each in empty_model(config, self.trust_remote_code).parameters()]
        return -(-sum(sizes) // ranks), -(-max(sizes) // ranks)

    def config(self) -> dict[str, Any]:
        """DeepSpeed's, with a folder that is made for it."""
        if self.offload != "nvme":
            return zero3(self.dtype, self.offload)
        assert self.nvme_path is not None
        model = load_config(self.path, "teacher", self.trust_remote_code)
        ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.check_disk(model, ranks, nvme.ranks_here(ranks))
        return zero3(self.dtype, self.offload, nvme.folder_in(self.nvme_path), self._shares(model, ranks)[1])


class _Body(nn.Module):
    """What the engine runs: the model up to its head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, positions: Tensor, past: Any = None) -> Tensor:
        return hidden_states(self.model, ids, positions, past)


class _ShardedTeacher:
    """No module, on purpose: Lightning and the student's engine would take it for part of the student."""

    def __init__(self, source: Sharded, opening: Opening) -> None:
        self.source, self.opening = source, opening
        self.engine: Any = None
        self.model: Any = None
        self.prefix: Prefix | None = None

    def check(self) -> None:
        """Load and shard. Not earlier: the process group is up and the student is in place by now."""
        if self.engine is not None:
            return
        config = self.source.config()
        self.model = load_sharded(
            self.source.path,
            config,
            dtype=DTYPES[self.source.dtype],
            attention=self.opening.attention,
            role="teacher",
            trust_remote_code=self.source.trust_remote_code,
        )
        self.engine = engine_of(_Body(self.model), config)
        with self._whole():
            check_split(self.model, self.opening.vocabulary, self.opening.packed)
        self.prefix = prefix_of(self.opening, self.engine, self.model)

    def look(self, batch: dict[str, Any], wanted: Wanted) -> Looked:
        return look_through(self.model, self.engine, batch, wanted, self.prefix)

    def give(self, looked: Looked, work: Callable[[Signal], Result]) -> Result:
        with gathered(self.model.get_output_embeddings().parameters()):
            return work(signal_of(looked, head_of(self.model), self.opening))

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, **words: Any
    ) -> Iterator[tuple[int, list[Answer]]]:
        """As models.generation.generate; every rank with equally many prompts, its own or others'."""
        with self._whole():
            yield from generate(self.model, prompts, sampling, **{**words, "synced": True})

    def log_probabilities(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], **words: Any
    ) -> list[list[float]]:
        """As models.generation.log_probabilities; every rank with equally many pairs."""
        with self._whole():
            return log_probabilities(self.model, pairs, **words)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.destroy()
            self.engine = self.model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _whole(self) -> Any:
        """The head beside the body, whose own forward gathers it."""
        return gathered(self.model.get_output_embeddings().parameters())
