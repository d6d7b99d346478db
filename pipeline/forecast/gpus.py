"""What a GPU has, by its makers' data sheets (dense rates, without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import Refusal
from pipeline.config import nearest


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int  # as PyTorch sees it
    bfloat16: float  # operations a second
    float32: float  # the same, of plain fp32, which is what 32-true computes in
    bandwidth: float  # bytes a second of its memory


def _gpu(name: str, gib: float, bfloat16_tera: float, float32_tera: float, gigabytes: float) -> GPU:
    return GPU(name, int(gib * 2**30), bfloat16_tera * 1e12, float32_tera * 1e12, gigabytes * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", 39.4, 312, 19.5, 1555),
        _gpu("a100", 79.1, 312, 19.5, 2039),
        _gpu("h100", 79.1, 989, 67, 3350),
        _gpu("h200", 139.8, 989, 67, 4800),
        _gpu("b200", 178, 2250, 75, 8000),
        _gpu("l40s", 44.4, 362, 91.6, 864),
        _gpu("rtx4090", 23.5, 165, 82.6, 1008),
        _gpu("mi300x", 191, 1307, 163.4, 5300),
    )
}


def gpu_of(name: str) -> GPU:
    if name not in GPUS:
        raise Refusal(f"forecast.gpu={name}: unknown{nearest(name, list(GPUS))}")
    return GPUS[name]
