"""Where a run is to take place, as the forecast is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.errors import Refusal
from pipeline.forecast.gpus import GPU, gpu_of

CPU = "cpu"


@dataclass(frozen=True)
class Place:
    gpu: GPU | None  # None: CPU ranks, whose memory is counted and whose time is not known
    gpus: int
    gpus_per_node: int
    efficiency: float  # share of the peak rate that is reached
    usable: float  # share of the memory that tensors may take

    @classmethod
    def of(cls, said: dict[str, Any], ranks: int) -> Place:
        """`said`: the section `forecast` of the configuration. Raises Refusal."""
        for name in ("efficiency", "usable_memory"):
            if not 0 < said[name] <= 1:
                raise Refusal(f"forecast.{name}={said[name]}: need a share in (0, 1]; 0.4 is 40 %")
        for name in ("gpus", "gpus_per_node"):
            if said[name] is not None and said[name] < 1:
                raise Refusal(f"forecast.{name}={said[name]}: need at least 1")
        gpu = None if said["gpu"] == CPU else gpu_of(said["gpu"])
        return cls(gpu, said["gpus"] or ranks, said["gpus_per_node"], said["efficiency"], said["usable_memory"])

    @property
    def ranks_of_a_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def cuda(self) -> bool:
        return self.gpu is not None

    @property
    def usable_bytes(self) -> float:
        return float("inf") if self.gpu is None else self.gpu.memory_bytes * self.usable

    def rate(self, precision: str) -> float | None:
        """Operations a second of all GPUs, as far as they are reached."""
        if self.gpu is None:
            return None
        peak = self.gpu.float32 if precision in ("32-true", "float32") else self.gpu.bfloat16
        return peak * self.efficiency * self.gpus
