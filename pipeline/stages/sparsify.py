"""Set weights of a model's layers to zero, a share of them or N of every M, and count the zeros of what was written."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.experts import LEAST_TOKENS, check_experts_read
from models.layerwise import Turn, in_turn
from models.load import DTYPES, parameter_count
from models.matrices import Matrix, chosen
from models.offloaded import Offloaded
from models.representations import decoder_layers
from models.save import save_model
from models.sparsity.magnitude import Magnitude
from models.sparsity.method import Method, Pattern
from models.sparsity.zeros import counted
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.calibration import Calibration
from pipeline.data.source import DataSource, source_key
from pipeline.forecast.workload import Reads
from pipeline.progress import shown
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.layer_by_layer import FinishedLayers, LayerByLayer, check_reached, told_of_experts


@dataclass(frozen=True)
class Sparsify(Stage):
    """Zeros in place: the result has the same shape, and is an ordinary checkpoint."""

    makes: ClassVar[Makes] = "model"
    immaterial: ClassVar[frozenset[str]] = frozenset({"calibration.batch_size"})

    model: str  # folder or hub id
    data: DataSource  # of whose training split some text is the calibration
    sparsity: Method
    calibration: Calibration
    fraction: float | None = 0.5
    pattern: str | None = None
    skip: Sequence[str] = ()
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.pattern is None):
            raise Refusal(
                f"sparsify.fraction={self.fraction} and sparsify.pattern={self.pattern}: need one, the other null"
            )
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise Refusal(f"sparsify.fraction={self.fraction}: need (0, 1); 0.5 sets half of the weights to zero")
        if self.pattern is not None:
            Pattern.parse(self.pattern)
        _ = self.layer_by_layer  # its own checks

    @property
    def layer_by_layer(self) -> LayerByLayer:
        return LayerByLayer(
            "sparsify",
            self.model,
            self.data,
            self.sparsity.reading is not None,
            self.calibration,
            self.dtype,
            self.trust_remote_code,
            self.seed,
        )

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return self.layer_by_layer.parents()

    def content(self) -> str:
        """Hash of the calibration text."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        return self.layer_by_layer.check(context, self._chosen)

    def workload(self, context: Context) -> Reads | None:
        return self.layer_by_layer.workload(context, self._chosen)

    def prepare(self, context: Context) -> None:
        """There are no other ranks."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        tokenizer, given, batches = self.layer_by_layer.open(context)
        model = given.model
        wanted = self._wanted(given, self._chosen(model))
        finished, count = FinishedLayers(context.work, model), len(decoder_layers(model))
        finished.report(context.stage)
        for turn in shown(in_turn(model, batches, given.weights), count, context.stage):
            mine = {matrix: zeros for matrix, zeros in wanted.items() if matrix.layer == turn.number}
            self._take(context, finished, turn, mine)
        manifest = context.manifest(self.makes)

        def build(folder: Path) -> None:
            save_model(model, tokenizer, folder, finished.state(), DTYPES[self.dtype])
            again = self.layer_by_layer.load(context, str(folder), "made")
            _check_held(context, again, wanted)
            zeros = counted(again.model, again.weights)
            manifest["certificates"] = {"zeros": zeros, **({"pattern_held": True} if self.pattern else {})}
            manifest["metrics"] = {"parameters": parameter_count(again.model), "zeros": zeros["all"]["fraction"]}
            manifest["metrics"] |= told_of_experts(context.stage, finished.routed(wanted), "magnitude")
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        total = manifest["certificates"]["zeros"]["all"]
        print(f"{context.stage}: {total['zeros']:,} of {total['weights']:,} weights of the layers' matrices are zero")

    def _chosen(self, model: Any) -> list[Matrix]:
        """The matrices that lose weights. Raises Refusal for settings that do not fit this model."""
        taken = chosen(model, self.skip, "sparsify.skip")
        if self.sparsity.reading is not None:
            check_experts_read(model, taken, f"the method {type(self.sparsity).__name__}", "sparsity=magnitude")
        if self.pattern is not None:
            self._check_widths(model, taken, Pattern.parse(self.pattern))
        return taken

    def _check_widths(self, model: Any, chosen: Sequence[Matrix], pattern: Pattern) -> None:
        widths = {matrix: matrix.of(model.get_parameter(matrix.parameter)).shape[-1] for matrix in chosen}
        for matrix, width in widths.items():
            if width % pattern.of:
                common = math.gcd(*widths.values())
                fit = [str(m) for m in range(2, 65) if common % m == 0]
                raise Refusal(
                    f"sparsify.pattern={self.pattern}: {matrix} has {width} inputs, which {pattern.of} does not "
                    f"divide; need M of {', '.join(fit) or 'nothing that fits all'}, or "
                    f"skip=[{matrix.name.rpartition('.')[2]}]"
                )

    def _wanted(self, given: Offloaded, chosen: Sequence[Matrix]) -> dict[Matrix, int | Pattern]:
        if self.pattern is not None:
            return dict.fromkeys(chosen, Pattern.parse(self.pattern))
        assert self.fraction is not None
        return dict(zip(chosen, self.sparsity.zeros(_OnDisk(given, chosen), self.fraction), strict=True))

    @torch.no_grad()
    def _take(
        self, context: Context, finished: FinishedLayers, turn: Turn, wanted: dict[Matrix, int | Pattern]
    ) -> None:
        """Sparsify one layer; or take the result of a run that was killed after it."""
        if turn in finished:
            finished.restore(turn)
            return
        activations: dict[str, Any] = {}
        if self.sparsity.reading is not None:
            activations = turn.read(self.sparsity.reading, any(matrix.slot is not None for matrix in wanted))
            check_reached(context.stage, wanted, activations)
        for matrix, zeros in wanted.items():
            weight = matrix.of(finished.model.get_parameter(matrix.parameter))
            few = turn.routed.get(matrix.place, LEAST_TOKENS) < LEAST_TOKENS
            method = Magnitude() if few else self.sparsity
            weight.copy_(method.sparsified(weight, zeros, activations.get(matrix.place)))
        finished.keep(turn)


@dataclass(frozen=True)
class _OnDisk(Sequence[Tensor]):
    """Matrices that lie on disk; each is read whenever it is used."""

    model: Offloaded
    matrices: Sequence[Matrix]

    def __len__(self) -> int:
        return len(self.matrices)

    def __getitem__(self, at: Any) -> Any:
        return self.matrices[at].of(self.model.weights[self.matrices[at].parameter])


def _check_held(context: Context, made: Offloaded, wanted: dict[Matrix, int | Pattern]) -> None:
    """Raises Refusal where the folder that was written has fewer zeros than were asked for."""
    for matrix, zeros in wanted.items():
        weight = matrix.of(made.weights[matrix.parameter])
        held = zeros.held(weight) if isinstance(zeros, Pattern) else int((weight == 0).sum()) >= zeros
        if not held:
            asked = f"{zeros.kept}:{zeros.of}" if isinstance(zeros, Pattern) else f"{zeros:,} zeros"
            raise Refusal(f"{context.stage}: {matrix} does not have {asked} once reloaded; nothing was written")
