"""What a GPU has, by its makers' data sheets (dense rates, without sparsity)."""

from __future__ import annotations

from dataclasses import dataclass

from models.errors import Refusal
from models.training.costs import peak_flops
from pipeline.config import nearest


@dataclass(frozen=True)
class GPU:
    name: str
    memory_bytes: int  # as PyTorch sees it
    bfloat16: float  # operations a second
    float32: float  # the same, of plain fp32, which is what 32-true computes in
    bandwidth: float  # bytes a second of its memory


def _gpu(name: str, device: str, gib: float, gigabytes: float) -> GPU:
    """`device`: as PyTorch calls it, of which models/training/costs.py knows the rates."""
    bfloat16, float32 = (peak_flops(device, precision, tf32=False) for precision in ("bf16-mixed", "32-true"))
    assert bfloat16 is not None
    assert float32 is not None
    return GPU(name, int(gib * 2**30), bfloat16, float32, gigabytes * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 39.4, 1555),
        _gpu("a100", "NVIDIA A100-SXM4-80GB", 79.1, 2039),
        _gpu("h100", "NVIDIA H100 80GB HBM3", 79.1, 3350),
        _gpu("h200", "NVIDIA H200", 139.8, 4800),
        _gpu("b200", "NVIDIA B200", 178, 8000),
        _gpu("l40s", "NVIDIA L40S", 44.4, 864),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 23.5, 1008),
        _gpu("mi300x", "AMD Instinct MI300X", 191, 5300),
    )
}


def gpu_of(name: str) -> GPU:
    if name not in GPUS:
        raise Refusal(f"forecast.gpu={name}: unknown{nearest(name, list(GPUS))}")
    return GPUS[name]
