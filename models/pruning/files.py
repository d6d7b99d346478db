"""The files beside a pruned model: plan.json (which units were kept, and why) and scores.safetensors (statistics of the
calibration text, which later runs can add up)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from models.errors import Refusal
from models.files import checksum, written_aside
from models.pruning.groups import Anatomy
from models.pruning.importance import Statistics
from models.pruning.plan import Scores
from models.pruning.sizes import Size
from models.pruning.surgery import Kept


def read_plan(path: Path, anatomy: Anatomy, model: str | None = None) -> tuple[dict[str, np.ndarray], str]:
    """Kept units of a plan.json, and a note. Raises Refusal for what this model does not have.

    `model`: the hash of the model that is pruned; that the plan was made of another one is only noted, as weights may
    have been trained since.
    """
    try:
        plan = json.loads(path.read_text())
        named, units = dict(plan["kept"]), dict(plan.get("units", {}))
        made_of = (plan.get("model") or {}).get("content_hash")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        raise Refusal(f"prune.plan={path}: no plan: {type(problem).__name__} {problem}; need a plan.json") from None
    if not named:
        raise Refusal(f"prune.plan={path}: it keeps everything; nothing would be removed")
    kept = {}
    for name, numbers in named.items():
        group = anatomy.groups.get(name)
        if group is None:
            raise Refusal(f"prune.plan={path}: this model has no group {name}")
        if units.get(name, group.units) != group.units:
            raise Refusal(f"prune.plan={path}: {name} has {units[name]} units there, and {group.units} in this model")
        there = isinstance(numbers, list) and all(type(n) is int and 0 <= n < group.units for n in numbers)
        if not there or not numbers or sorted(set(numbers)) != numbers:
            raise Refusal(
                f"prune.plan={path}: {name} keeps {str(numbers)[:60]}; need rising numbers from 0 to {group.units - 1}"
            )
        kept[name] = np.array(numbers)
    other = made_of is not None and model is not None and made_of != model
    return kept, "as the plan says" + (", which was made of other weights" if other else "")


def write_plan(path: Path, plan: dict[str, Any]) -> None:
    """JSON with each group's units on one line: there can be ten thousand."""
    lines = []
    for name, value in plan.items():
        if name in ("kept", "scores"):
            inner = ",\n".join(f"    {json.dumps(key)}: {json.dumps(units)}" for key, units in value.items())
            lines.append(f"  {json.dumps(name)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def plan_of(
    model: dict[str, str] | None,
    anatomy: Anatomy,
    kept: Kept,
    scores: Scores,
    sizes: tuple[Size, Size],
    config: Any,
    notes: list[str],
) -> dict[str, Any]:
    """The content of plan.json. `model`: path and hash of the model that was pruned; `sizes`: before and after;
    `config`: of the pruned model."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    layer = kept["layers"][0] if "layers" in kept else 0
    mlp = next(group for group in anatomy.of("mlp") if group.layer == layer)
    widths = {"mlp": len(kept.get(mlp.name, range(mlp.units))), "heads": heads * anatomy.head_dim}
    return {
        "model": model,
        "kept": {name: units.tolist() for name, units in sorted(kept.items())},
        "units": {name: anatomy.groups[name].units for name in sorted(kept)},
        "before": vars(sizes[0]),
        "after": vars(sizes[1]),
        "notes": notes,
        "loads_in": {
            "transformers": f"AutoModelForCausalLM, as {config.model_type}",
            "vllm": f"tensor parallel sizes {_parallel(heads, kv_heads, widths['mlp'])}",
            "llama.cpp": _blocks_of(config.hidden_size, widths),
        },
        "config": {k: v for k, v in config.to_dict().items() if k != "transformers_version"},
        "scores": {name: [float(f"{value:.6g}") for value in each] for name, each in sorted(scores.items())},
    }


def _parallel(heads: int, kv_heads: int, width: int) -> str:
    """vLLM splits heads and MLP evenly, and KV heads evenly or as copies."""
    even = [n for n in (1, 2, 4, 8, 16, 32) if heads % n == 0 and width % n == 0]
    return ", ".join(str(n) for n in even if kv_heads % n == 0 or n % kv_heads == 0)


def _blocks_of(hidden: int, widths: Mapping[str, int]) -> str:
    """llama.cpp quantizes the rows of a matrix in blocks of 32, K-quants in blocks of 256; others stay in 16 bits."""
    rows = {"hidden": hidden, **widths}
    notes = []
    for block, kinds in ((256, "K-quants"), (32, "Q4_0 and Q8_0")):
        odd = [f"{name} {width}" for name, width in rows.items() if width % block]
        notes.append(f"{kinds} fit all rows" if not odd else f"{kinds} do not fit rows of {', '.join(odd)}")
    return "; ".join(notes)


def read_scores(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Statistics, and what they are of."""
    try:
        with safe_open(path, "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["of"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as problem:
        raise Refusal(
            f"prune.scores={path}: no scores: {problem}; need a scores.safetensors of an earlier run"
        ) from None


def read_partial_scores(path: Path, fingerprint: str) -> tuple[Statistics, int]:
    """The statistics that a killed run had gathered, and of how many batches; none where the file is damaged."""
    try:
        with safe_open(path, "np") as file:
            told = file.metadata()
            statistics = {name: file.get_tensor(name) for name in file.keys()}
            whole = told["checksum"] == checksum(told["batches"].encode(), statistics)
            return (statistics, int(told["batches"])) if whole and told["of"] == fingerprint else ({}, 0)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return {}, 0


def write_partial_scores(path: Path, statistics: Statistics, fingerprint: str, batches: int) -> None:
    """The statistics of the batches so far."""
    told = {"of": fingerprint, "batches": str(batches), "checksum": checksum(str(batches).encode(), statistics)}
    with written_aside(path) as aside:
        save_file(statistics, aside, metadata=told)
