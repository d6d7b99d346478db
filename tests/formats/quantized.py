"""Small models on a grid, as the stage quantize would leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from models.formats.format import Plan
from models.matrices import matrices
from models.quantization.activations import Activations
from models.quantization.grid import Grid
from models.quantization.methods.clipped import Clipped
from models.quantization.record import Record, read_known
from tests.pruning.families import model_of


def quantized(
    folder: Path,
    grid: Grid,
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
            found = made[str(matrix)] = Clipped(steps=8).quantized(weight_OI, grid, None)
            weight_OI.copy_(found.dequantized())
    model.config.dtype = dtype
    model.save_pretrained(folder)
    scales = {}
    if activations is not None and not activations.dynamic:
        scales = {name: torch.tensor(0.01 + 0.001 * number) for number, name in enumerate(made)}
    Record(grid, made, activations, scales).write(folder / "grid.safetensors")
    return folder


def plan_of(folder: Path, grid: Grid | None, activations: Activations | None = None) -> Plan:
    from models.load import load_config

    shapes = read_known(folder / "grid.safetensors").shapes
    return Plan(load_config(str(folder)), shapes, grid, activations)
