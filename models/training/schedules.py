"""Learning rate over the steps: a factory per conf/schedule/*.yaml, taking (optimizer, total steps)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_cosine_with_min_lr_schedule_with_warmup, get_wsd_schedule

from models.errors import Refusal

Schedule = Callable[[Optimizer, int], LRScheduler]


def cosine(warmup_steps: int, minimum: float = 0.1) -> Schedule:
    """Linear warm-up, then half a cosine down to `minimum` times the learning rate."""

    def make(optimizer: Optimizer, steps: int) -> Any:
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, _within(warmup_steps, steps), steps, min_lr_rate=minimum
        )

    return make


def warmup_stable_decay(warmup_steps: int, decay_fraction: float = 0.2, minimum: float = 0.0) -> Schedule:
    """Linear warm-up, a plateau, and a cosine decay over the last `decay_fraction` of the steps (MiniCPM,
    arXiv:2404.06395)."""
    if not 0 <= decay_fraction <= 1:
        raise Refusal(f"schedule.decay_fraction={decay_fraction}: need [0, 1]; 0.2 decays over the last fifth")

    def make(optimizer: Optimizer, steps: int) -> Any:
        warmup = _within(warmup_steps, steps)
        decay = min(round(decay_fraction * steps), steps - warmup)
        return get_wsd_schedule(optimizer, warmup, decay, num_training_steps=steps, min_lr_ratio=minimum)

    return make


def constant(warmup_steps: int = 0) -> Schedule:
    """Linear warm-up, then no change."""
    return warmup_stable_decay(warmup_steps, decay_fraction=0.0)


def _within(warmup_steps: int, steps: int) -> int:
    if warmup_steps < 0:
        raise Refusal(f"schedule.warmup_steps={warmup_steps}: need 0 or more")
    return min(warmup_steps, steps)
