"""What containers have in common that hold a linear module's weight as integers and scales."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from models.errors import Refusal
from models.formats.checkpoint import dtype_of, in_dtype, names
from models.formats.format import Finished, Format, Plan
from models.load import empty_model
from models.matrices import matrices
from models.quantization.grid import SCALE_DTYPES, Grid, Quantized
from models.quantization.record import Record

# O what a matrix gives, I what it reads, G groups of I


def check_installed(setting: str, form: Format) -> None:
    """`setting`: the format, as the config names it."""
    for package in map(Requirement, form.needs):
        try:
            found = metadata.version(package.name)
        except metadata.PackageNotFoundError:
            found = None
        if found is None or not package.specifier.contains(found, prereleases=True):
            raise Refusal(
                f"{setting} needs {package}, and {found or 'none'} is installed; pip install '{package}', or leave the "
                f"format out: {setting}=null"
            ) from None


def grid_of(plan: Plan, name: str) -> Grid:
    """Raises Refusal where there is none, and where its matrices are no linear modules of their own."""
    if plan.grid is None:
        raise Refusal(
            f"format={name}: the model's weights are on no grid; run the stage quantize before export, or leave the "
            f"format out (huggingface takes any model)"
        )
    plain = {str(matrix): matrix for matrix in matrices(empty_model(plan.config))}
    for each in plan.shapes:
        matrix = plain.get(each)
        if matrix is None:
            raise Refusal(f"format={name}: {each} is on the grid, and the model has no such matrix")
        if matrix.slot is not None:
            raise Refusal(
                f"format={name}: {each} lies in one tensor with other experts, and the container holds linear modules; "
                f"use format=huggingface, or leave it out of the grid: stages.quantize.skip=[{matrix.name}]"
            )
        if matrix.transposed:
            raise Refusal(
                f"format={name}: {each} is a Conv1D ({plan.config.model_type}), and the container holds linear "
                f"modules; use format=huggingface"
            )
    return plan.grid


def check_scales(plan: Plan, grid: Grid, name: str) -> None:
    """Refuse scales that the model's dtype rounds: this container's are opened in that dtype."""
    dtype = dtype_of(plan.config)
    if dtype not in ("float32", grid.scale_dtype):
        raise Refusal(
            f"format={name}: the model is {dtype}, which rounds scales of grid.scale_dtype={grid.scale_dtype}; "
            f"quantize with grid.scale_dtype={dtype}, or export with stages.export.dtype={grid.scale_dtype}"
        )


def check_divides(plan: Plan, name: str, outputs: int, inputs: int) -> None:
    """Refuse matrices whose integers do not fill whole words."""
    for each, (gives, reads) in plan.shapes.items():
        for width, word, what in ((gives, outputs, "gives"), (reads, inputs, "reads")):
            if width % word:
                raise Refusal(
                    f"format={name}: {each} {what} {width} numbers, and the container packs {word} at once; cut to "
                    f"stages.prune.multiple_of={word}, skip the matrix in stages.quantize.skip, or use "
                    f"format=compressed_tensors"
                )


def check_group(grid: Grid, name: str, sizes: Collection[int]) -> None:
    if grid.granularity == "group" and grid.group_size not in sizes:
        raise Refusal(
            f"format={name}: grid.group_size={grid.group_size}; need one of {', '.join(map(str, sizes))}, or "
            f"granularity=channel"
        )


def left_out(config: Any, taken: Iterable[str]) -> list[str]:
    """Linear modules that stay as they are, with the head, by their names: what a container's config has to name."""
    held = {name.removesuffix(".weight") for name in taken}
    return [
        name
        for name, module in empty_model(config).named_modules()
        if isinstance(module, nn.Linear) and name not in held
    ]


def changed(
    finished: Finished, packed: Callable[[str, Quantized], Mapping[str, Tensor]]
) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """For models.formats.checkpoint.rewritten: matrices as `packed` makes them, by their modules' names; all else in
    the export's dtype."""
    assert finished.record is not None
    record = finished.record

    def change(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if name not in record.matrices:
            return {name: in_dtype(tensor, finished.dtype)}
        module = name.removesuffix(".weight")
        return {f"{module}.{part}": value for part, value in packed(name, record.matrices[name]).items()}

    return change


def record_of(finished: Finished) -> Record:
    """Raises Refusal for a checkpoint in which a matrix of the record is not found under its name."""
    assert finished.record is not None
    present = names(finished.folder)
    if missing := [name for name in finished.record.matrices if name not in present]:
        raise Refusal(f"{finished.folder}: {missing[0]} is on the grid, and the checkpoint has no tensor of that name")
    return finished.record


def scales_OG(quantized: Quantized, dtype: str) -> Tensor:
    """[O, G], one for each output also where the whole matrix has one; in the grid's dtype, exactly."""
    outputs = quantized.integers.shape[0]
    found = quantized.scale.to(SCALE_DTYPES[dtype])
    if not torch.equal(found.float(), quantized.scale):
        raise Refusal(f"a scale is no number of {dtype}; run the stage quantize again")
    return found.expand(outputs, -1).contiguous()
