"""What the containers share that hold a linear module's weight as integers and scales."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement
from torch import Tensor, nn

from models.errors import Problems, Refusal
from models.formats.checkpoint import dtype_of, in_dtype, names
from models.formats.format import Finished, Format, Plan
from models.load import empty_model
from models.matrices import matrices
from models.quantization.scheme import SCALE_DTYPES, QuantizedMatrix, Scheme, WeightScheme
from models.quantization.stored import QuantizedWeights

# O outputs of a matrix, I its inputs, G groups of I


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


def scheme_of(plan: Plan, name: str) -> Scheme:
    """Raises Refusal where there is none, and where its matrices are no linear modules of their own."""
    if plan.scheme is None:
        raise Refusal(
            f"format={name}: it holds quantized weights, and the model's are not; quantize them with "
            f"quantize.scheme=w4a16_g128, or use format=[huggingface], which takes any model"
        )
    plain = {str(matrix): matrix for matrix in matrices(empty_model(plan.config))}
    for each in plan.shapes:
        matrix = plain.get(each)
        if matrix is None:
            raise Refusal(f"format={name}: {each} is quantized, and the model has no such matrix")
        if matrix.slot is not None:
            raise Refusal(
                f"format={name}: {each} lies in one tensor with other experts, and the container holds linear modules; "
                f"use format=[huggingface], or do not quantize it: quantize.skip=[{matrix.name}]"
            )
        if matrix.transposed:
            raise Refusal(
                f"format={name}: {each} is a Conv1D ({plan.config.model_type}), and the container holds linear "
                f"modules; use format=[huggingface]"
            )
    return plan.scheme


def check_scales(plan: Plan, scheme: WeightScheme, name: str) -> None:
    """Refuse scales that the model's dtype rounds: this container's are opened in that dtype."""
    dtype = dtype_of(plan.config)
    if dtype not in ("float32", scheme.scale_dtype):
        raise Refusal(
            f"format={name}: the model is {dtype}, which rounds scales in {scheme.scale_dtype}; quantize with "
            f"quantize.scheme.weights.scale_dtype={dtype}, or export with export.dtype={scheme.scale_dtype}"
        )


def check_float16(problems: Problems, scheme: Scheme, name: str) -> None:
    """Of a container that has scales in float16, and no activations."""
    if (dtype := scheme.weights.scale_dtype) != "float16":
        problems.add(
            f"format={name}: scales are float16 there, and not {dtype}; quantize with "
            f"quantize.scheme.weights.scale_dtype=float16"
        )
    if scheme.activations is not None:
        problems.add(f"format={name}: it cannot hold quantized activations; use format=[compressed_tensors]")


def check_divides(plan: Plan, name: str, outputs: int, inputs: int) -> None:
    """Refuse matrices whose integers do not fill whole words."""
    odd = {
        each: f"{width} {what}, and the container packs {word} at once"
        for each, shape in plan.shapes.items()
        for width, word, what in ((shape[0], outputs, "outputs"), (shape[1], inputs, "inputs"))
        if width % word
    }
    if odd:
        skip = dict.fromkeys(each.removesuffix(".weight").rpartition(".")[2] for each in odd)
        raise Refusal(
            f"format={name}: {next(iter(odd))} has {next(iter(odd.values()))}; use format=[compressed_tensors], prune "
            f"with prune.multiple_of={max(outputs, inputs)}, or leave such matrices as they are with "
            f"quantize.skip=[{','.join(skip)}]"
        )


def left_out(config: Any, taken: Iterable[str]) -> list[str]:
    """Names of the linear modules that are not quantized, with the head: a container's config has to list them."""
    held = {name.removesuffix(".weight") for name in taken}
    return [
        name
        for name, module in empty_model(config).named_modules()
        if isinstance(module, nn.Linear) and name not in held
    ]


def changed(
    finished: Finished, packed: Callable[[str, QuantizedMatrix], Mapping[str, Tensor]]
) -> Callable[[str, Tensor], Mapping[str, Tensor]]:
    """For models.formats.checkpoint.rewritten: quantized matrices are replaced by what `packed` makes, under
    their modules' names; all other tensors get the export's dtype."""
    assert finished.quantized is not None
    matrices = finished.quantized.matrices

    def change(name: str, tensor: Tensor) -> Mapping[str, Tensor]:
        if name not in matrices:
            return {name: in_dtype(tensor, finished.dtype)}
        module = name.removesuffix(".weight")
        return {f"{module}.{part}": value for part, value in packed(name, matrices[name]).items()}

    return change


def quantized_of(finished: Finished) -> QuantizedWeights:
    """Raises Refusal for a checkpoint in which a quantized matrix is not found under its name."""
    assert finished.quantized is not None
    present = names(finished.folder)
    if missing := [name for name in finished.quantized.matrices if name not in present]:
        raise Refusal(f"{finished.folder}: {missing[0]} is quantized, and the checkpoint has no tensor of that name")
    return finished.quantized


def scales_OG(quantized: QuantizedMatrix, dtype: str) -> Tensor:
    """[O, G], one for each output also where the whole matrix has one; in the scheme's dtype, exactly."""
    outputs = quantized.integers.shape[0]
    found = quantized.scale.to(SCALE_DTYPES[dtype])
    if not torch.equal(found.float(), quantized.scale):
        raise Refusal(f"a scale is not exact in {dtype}; quantize the model again")
    return found.expand(outputs, -1).contiguous()
