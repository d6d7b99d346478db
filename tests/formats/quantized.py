"""Small quantized models, as the stage quantize would leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.formats.format import Plan
from models.matrices import matrices
from models.quantization.methods.clipped import Clipped
from models.quantization.scheme import Activations, Scheme, WeightScheme
from models.quantization.stored import QuantizedWeights, read_outline
from tests.pruning.families import model_of


def quantized(
    folder: Path,
    weights: WeightScheme,
    activations: Activations | None = None,
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
    **shape: Any,
) -> Path:
    """Ranges are clipped: whoever finds them anew from the weights finds others."""
    torch.manual_seed(0)
    model = model_of(family, dtype=dtype, vocab_size=300, **shape)
    made = {}
    with torch.no_grad():
        for matrix in matrices(model):
            weight_OI = matrix.of(model.get_parameter(matrix.parameter))
            found = made[str(matrix)] = Clipped(steps=8).quantized(weight_OI, weights, None)
            weight_OI.copy_(found.dequantized())
    model.config.dtype = dtype
    model.save_pretrained(folder)
    scales = {}
    if activations is not None and not activations.dynamic:
        scales = {name: torch.tensor(0.01 + 0.001 * number) for number, name in enumerate(made)}
    QuantizedWeights(Scheme(weights, activations), made, scales).write(folder / "quantized.safetensors")
    return folder


def plan_of(folder: Path, weights: WeightScheme | None, activations: Activations | None = None) -> Plan:
    from models.load import load_config

    shapes = read_outline(folder / "quantized.safetensors").shapes
    return Plan(load_config(str(folder)), shapes, None if weights is None else Scheme(weights, activations))
