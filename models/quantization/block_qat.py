"""Training with ggml's own rounding in the loop, for its K-quants, whose scales no gradient reaches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from models.errors import Refusal
from models.matrices import Matrix, chosen
from models.quantization.aware import Rounding, check_trainable
from models.quantization.ggml import Blocks, GgmlType
from models.quantization.stored import BlockWeights, Outline
from models.quantization.straight_through import straight_through


@dataclass(frozen=True)
class BlockQAT:
    """Every forward has ggml quantize the present weights and multiplies with what it reads back. It starts from any
    model; the blocks of the last step are what a GGUF file then holds."""

    type: str = "q4_k"  # of models.quantization.ggml.TYPES
    skip: Sequence[str] = ()
    cache: str | None = None
    needs_quantized: ClassVar[bool] = False

    def __post_init__(self) -> None:
        GgmlType(self.type)

    @property
    def multiple(self) -> int:
        return GgmlType(self.type).width

    def outline(self, plain: Any, start: Outline | None) -> Outline:
        if start is not None:
            raise Refusal(
                f"qat.type={self.type}: the student is quantized already and would be rounded twice; give the model "
                f"that it was made of"
            )
        shapes = {}
        for matrix in self._taken(plain):
            outputs, inputs = matrix.of(plain.get_parameter(matrix.parameter)).shape
            GgmlType(self.type).check(str(matrix), inputs)
            shapes[str(matrix)] = (outputs, inputs)
        return Outline(shapes, ggml=self.type)

    def open(self, quantized: Path, plain: Any) -> Rounding:
        return Rounding(BlockRule(GgmlType(self.type)), self._taken(plain), self.cache)

    def _taken(self, plain: Any) -> list[Matrix]:
        taken = chosen(plain, self.skip, "qat.skip")
        check_trainable(taken)
        return taken


class BlockRule:
    """A models.quantization.aware.Rule."""

    own: Sequence[str] = ()

    def __init__(self, kind: GgmlType) -> None:
        self.kind = kind
        self.step: int | None = None

    def give(self, module: Any, base: Any, matrix: Matrix) -> None:
        """Blocks hold their own scales."""

    def rounded(self, module: Any, weight_OI: Tensor, matrix: Matrix) -> Tensor:
        return straight_through(weight_OI, self.kind.rounded(weight_OI))

    def reading(self, matrix: Matrix) -> Callable[[Tensor], Tensor]:
        return lambda hidden: hidden

    def held(self, weight_OI: Tensor, matrix: Matrix, owned: Mapping[str, Tensor | None]) -> Blocks:
        return self.kind.pack(weight_OI)

    def stored(self, made: Mapping[str, Any], cache: str | None) -> BlockWeights:
        return BlockWeights(made, cache)
