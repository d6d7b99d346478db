"""What training costs: the arithmetic that its models need, against what the devices could do, and memory."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.experts import are_experts
from models.load import empty_model

# Dense products a second in (bf16, TF32, fp32), by what torch.cuda.get_device_name says; from NVIDIA's data sheets,
# where most figures are with sparsity and twice as large.
_PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    (r"\bG?B200\b", (2250e12, 1125e12, 75e12)),
    (r"H200 NVL", (835e12, 417.5e12, 60e12)),
    (r"H200|GH200|H100.*HBM3", (989.4e12, 494.7e12, 66.9e12)),
    (r"H100 NVL", (835e12, 417.5e12, 60e12)),
    (r"H100 PCIe", (756e12, 378e12, 51.2e12)),
    (r"\bA100\b", (312e12, 156e12, 19.5e12)),
    (r"\bL40S\b", (362e12, 183e12, 91.6e12)),
    (r"\bL4\b", (121e12, 60e12, 30.3e12)),
    (r"\bA10\b", (125e12, 62.5e12, 31.2e12)),
    (r"MI300X", (1307.4e12, 653.7e12, 163.4e12)),
    (r"RTX 4090\b(?! (?:D|Laptop))", (165.2e12, 82.6e12, 82.6e12)),
    (r"RTX 3090\b(?! Ti)", (71e12, 35.6e12, 35.6e12)),
)


def peak_flops(device_name: str, precision: str, tf32: bool) -> float | None:
    """Operations a second of a device at best; None where its data sheet is not known here. `precision`: Lightning's.
    `tf32`: whether fp32 products may run in it."""
    for pattern, (bf16, tf, fp32) in _PEAKS:
        if re.search(pattern, device_name):
            return bf16 if precision.startswith("bf16") else tf if tf32 else fp32
    return None


def peak_of(device: torch.device, precision: str) -> float | None:
    """Of the device that is here; None on a CPU."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return peak_flops(torch.cuda.get_device_name(device), precision, tf32)


def peak_memory_gb(device: torch.device) -> float:
    """The most that this process has held so far: on CUDA of the device's memory, in tensors; else of the host's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


@dataclass(frozen=True)
class Forward:
    """Floating-point operations of a model's forward: its matrix products, and attention over the tokens before."""

    body: int  # weights that a token is multiplied with, below the head
    head: int
    attention: Sequence[tuple[int, int | None]]  # of each layer: width of all heads, and its window (None: all before)

    @classmethod
    def of(cls, config: Any) -> Forward | None:
        """By the Hugging Face config. None where it does not say which share of its experts a token is sent to."""
        model: Any = empty_model(config)
        text = config.get_text_config()
        head = model.get_output_embeddings().weight
        aside = {id(head)} | {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        body = 0.0
        for module in model.modules():
            share = 1.0
            if are_experts(module):
                chosen = getattr(text, "num_experts_per_tok", None)
                if chosen is None:
                    return None
                share = chosen / max(len(p) for p in module.parameters(recurse=False))
            for parameter in module.parameters(recurse=False):
                if parameter.dim() >= 2 and id(parameter) not in aside:
                    body += share * parameter.numel()
        return cls(round(body), head.numel(), _attention(text))

    def linear(self, tokens: Tensor, predicted: Tensor) -> Tensor:
        return 2.0 * (self.body * tokens + self.head * predicted)

    def attended(self, positions: Tensor, needed: Tensor) -> Tensor:
        """`needed`: which of the tokens are counted; each attends to itself and to those before it in its document."""
        seen = (positions + 1).double() * needed
        total = seen.new_zeros(())
        for window in {window for _, window in self.attention}:
            width = sum(width for width, other in self.attention if other == window)
            total += 4.0 * width * (seen if window is None else seen.clamp(max=window)).sum()
        return total


def _attention(text: Any) -> list[tuple[int, int | None]]:
    heads, count = getattr(text, "num_attention_heads", 0), text.num_hidden_layers
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // max(1, heads))
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * count
    windows = {"full_attention": None, "attention": None, "sliding_attention": window}
    return [(width, windows[kind]) for kind in kinds[:count] if kind in windows]


@dataclass(frozen=True)
class Arithmetic:
    """Of a training step, without what is computed twice to save memory, and without padding (PaLM's definition of
    model FLOPs, arXiv:2204.02311, but for attention, which is counted as causal and within documents)."""

    student: Forward
    frozen: bool  # adapters are trained, and the matrices themselves get no gradient
    teacher: Forward | None  # None: its forward does not run here

    def of(self, batch: dict[str, Any]) -> Tensor:
        """Operations for a micro-batch, on its device. Tokens that no target depends on count for nothing."""
        learnt, positions = batch["targets"] >= 0, batch["position_ids"]
        needed, predicted = _needed(learnt, positions), learnt.sum()
        linear = self.student.linear(needed.sum(), predicted)
        total = (2 if self.frozen else 3) * linear + 3 * self.student.attended(positions, needed)
        if self.teacher is not None:
            if "teacher_input_ids" in batch:
                positions = batch["teacher_position_ids"]
                targets = batch.get("teacher_targets")
                needed = (
                    torch.ones_like(positions, dtype=torch.bool)
                    if targets is None
                    else _needed(targets >= 0, positions)
                )
                predicted = predicted if targets is None else (targets >= 0).sum()
            total = total + self.teacher.linear(needed.sum(), predicted) + self.teacher.attended(positions, needed)
        return total


def _needed(learnt: Tensor, positions: Tensor) -> Tensor:
    """The tokens of each row that a target depends on: those with one at or behind them, in the same document."""
    width = positions.shape[1]
    at = torch.arange(width, device=positions.device).expand_as(positions)
    begins = torch.where(positions == 0, at, width)
    next_begin = torch.cat([begins[:, 1:], torch.full_like(begins[:, :1], width)], 1)
    return _next(torch.where(learnt, at, width)) < _next(next_begin)


def _next(at: Tensor) -> Tensor:
    """The least of what stands at or behind each place."""
    return at.flip(1).cummin(1).values.flip(1)
