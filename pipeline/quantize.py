"""Put the weights of a model's layers on a grid of few bits, layer by layer, and show that the result is on it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from models.errors import Refusal
from models.layerwise import Matrix, Turn, check_read, chosen, in_turn
from models.load import DTYPES, parameter_count, save_model
from models.quantization.grid import Grid, Quantized
from models.quantization.method import Method
from models.quantization.record import Record, read_record
from models.representations import decoder_layers
from pipeline import artifact
from pipeline.calibration import Walk
from pipeline.context import Context
from pipeline.data.rows import RowSource, source_key
from pipeline.progress import shown


@dataclass(frozen=True)
class Quantize:
    """The result is an ordinary checkpoint whose weights are numbers of the grid; the integers lie beside it."""

    model: str  # folder or hub id
    data: RowSource  # of whose training split some text is the calibration
    grid: Grid
    method: Method
    skip: Sequence[str] = ()
    calibration_rows: int = 128
    calibration_tokens: int = 256  # of each row
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self._walk  # its own checks

    @property
    def _walk(self) -> Walk:
        return Walk(
            "quantize",
            self.model,
            self.data,
            self.method.reading is not None,
            self.calibration_rows,
            self.calibration_tokens,
            self.dtype,
            self.trust_remote_code,
            self.seed,
        )

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return self._walk.parents()

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> dict[str, Any]:
        taken: dict[str, list[int]] = {}

        def fits(model: Any) -> None:
            for matrix in self._chosen(model):
                taken[str(matrix)] = list(matrix.of(model.get_parameter(matrix.parameter)).shape)

        told = self._walk.check(context, fits)
        context.plan_grid(asdict(self.grid), None, taken)
        return told

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        dtype = DTYPES[self.dtype]
        tokenizer, model, batches = self._walk.open(context)
        taken = self._chosen(model)
        made: dict[Matrix, Quantized] = {}
        for turn in shown(in_turn(model, batches), len(decoder_layers(model)), context.stage):
            made |= self._take(context, model, turn, [matrix for matrix in taken if matrix.layer == turn.number])
        manifest = context.manifest("model")
        bits = _bits_per_weight(model, made, self.grid, dtype)

        def build(folder: Path) -> None:
            save_model(model, tokenizer, folder, model.state_dict(), dtype)
            self._record(made).write(folder / artifact.GRID)
            again = self._walk.load(str(folder))
            manifest["certificates"] = {"weights_bit_equal": _bit_equal(context, again, folder, dtype)}
            manifest["metrics"] = {"parameters": parameter_count(again), "bits_per_weight": bits}
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        print(f"{context.stage}: {len(made)} matrices on {self.grid}; {bits:.2f} bits per weight of the whole model")

    def _chosen(self, model: Any) -> list[Matrix]:
        """The matrices that go onto the grid. Raises Refusal for what cannot be asked of this model."""
        taken = chosen(model, self.skip, "quantize.skip")
        if self.method.reading is not None:
            check_read(
                taken, f"quantize.method={type(self.method).__name__}", "quantizer@stages.quantize.method=nearest"
            )
        for matrix in taken:
            self.grid.check(str(matrix), matrix.of(model.get_parameter(matrix.parameter)).shape[-1])
        return taken

    def _record(self, made: dict[Matrix, Quantized]) -> Record:
        return Record(self.grid, {str(matrix): quantized for matrix, quantized in made.items()})

    @torch.no_grad()
    def _take(self, context: Context, model: Any, turn: Turn, taken: Sequence[Matrix]) -> dict[Matrix, Quantized]:
        """Quantize one layer; or, where a run that was killed had done so, take what it left."""
        path = context.work / f"layer-{turn.number:05d}.safetensors"
        if not path.exists():
            read = {} if self.method.reading is None else turn.read(self.method.reading)
            made = {}
            for matrix in taken:
                if self.method.reading is not None and matrix.name not in read:
                    raise Refusal(
                        f"{context.stage}: no calibration token reaches {matrix}; take more rows, or "
                        f"skip=[{matrix.name}]"
                    )
                weight_OI = matrix.of(model.get_parameter(matrix.parameter))
                made[matrix] = self.method.quantized(weight_OI, self.grid, read.get(matrix.name))
            aside = path.with_suffix(".partial")
            self._record(made).write(aside)
            os.replace(aside, path)
        found = read_record(path).matrices
        kept = {matrix: found[str(matrix)] for matrix in taken}
        for matrix, quantized in kept.items():
            weight_OI = matrix.of(model.get_parameter(matrix.parameter))
            weight_OI.copy_(quantized.dequantized().to(weight_OI))
        return kept


def _bits_per_weight(model: Any, made: dict[Matrix, Quantized], grid: Grid, dtype: torch.dtype) -> float:
    """Of all parameters: those on the grid by their integers and scales, the others by the dtype."""
    numbers = parameter_count(model)
    on_grid = sum(quantized.integers.numel() for quantized in made.values())
    shapes = [tuple(quantized.integers.shape) for quantized in made.values()]
    bits = sum(grid.bits_per_weight((shape[0], shape[1])) * shape[0] * shape[1] for shape in shapes)
    return (bits + (numbers - on_grid) * torch.finfo(dtype).bits) / numbers


def _bit_equal(context: Context, model: Any, folder: Path, dtype: torch.dtype) -> bool:
    """Whether every weight that is opened from the folder is the number that the integers beside it say."""
    by_name = {str(matrix): matrix for matrix in chosen(model, (), "")}
    for name, quantized in read_record(folder / artifact.GRID).matrices.items():
        matrix = by_name[name]
        weight_OI = matrix.of(model.get_parameter(matrix.parameter))
        if not torch.equal(weight_OI, quantized.dequantized().to(dtype)):
            raise Refusal(f"{context.stage}: {name} is not on its grid once reloaded; nothing was written")
    return True
