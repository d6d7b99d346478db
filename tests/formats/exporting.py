"""Small models as folders, plain and quantized, in widths that blocks divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.formats.format import Finished
from models.matrices import matrices
from models.quantization.ggml import GgmlType
from models.quantization.scheme import Scheme, WeightScheme
from models.quantization.stored import BlockWeights, QuantizedWeights
from tests.pruning.families import model_of

WIDE = {"hidden_size": 64, "intermediate_size": 96}
WIDTHS: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "mistral": {**WIDE, "head_dim": 24, "sliding_window": None},
    "mixtral": WIDE,
    "qwen2": WIDE,
    "qwen3": {**WIDE, "head_dim": 8},
    "qwen3_moe": {**WIDE, "head_dim": 8, "moe_intermediate_size": 32},
    "gemma": {**WIDE, "tie_word_embeddings": True},
    "gemma2": {**WIDE, "tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "phi3": WIDE,
    "gpt2": {"n_embd": 64, "hidden_size": 64, "n_inner": 96},
}


def small(family: str, **values: Any) -> Any:
    return model_of(family, dtype=torch.float32, **{**WIDTHS[family], "bos_token_id": 1, "eos_token_id": 2, **values})


def as_folder(model: Any, folder: Path) -> Finished:
    model.save_pretrained(folder)
    return Finished(folder, None, "float32")


@torch.no_grad()
def with_scheme(model: Any, weights: WeightScheme, folder: Path, skip: str = "nothing") -> Finished:
    """The model's layers are quantized in place."""
    made = {}
    for matrix in matrices(model):
        if matrix.name.endswith(skip):
            continue
        weight_OI = matrix.of(model.get_parameter(matrix.parameter))
        made[str(matrix)] = weights.quantize(weight_OI, *weights.of_range(*weights.ranges(weight_OI)))
        weight_OI.copy_(made[str(matrix)].dequantized())
    model.save_pretrained(folder)
    return Finished(folder, QuantizedWeights(Scheme(weights), made), "float32")


@torch.no_grad()
def on_blocks(model: Any, kind: GgmlType, folder: Path) -> Finished:
    made = {}
    for matrix in matrices(model):
        weight_OI = matrix.of(model.get_parameter(matrix.parameter))
        made[str(matrix)] = kind.pack(weight_OI)
        weight_OI.copy_(made[str(matrix)].dequantized())
    model.save_pretrained(folder)
    return Finished(folder, None, "float32", BlockWeights(made))


def differences(ours: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest difference of logits, mean KL of a token."""
    p, q = truth.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((ours - truth).abs().max()), float((p.exp() * (p - q)).sum(-1).mean())
