"""Quantize the weights of a model, layer by layer, and prove that the result is made of its integers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from hydra.utils import instantiate
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.errors import Refusal
from models.experts import LEAST_TOKENS, check_experts_read
from models.files import written_aside
from models.layerwise import Turn, in_turn
from models.load import DTYPES, parameter_count
from models.matrices import Matrix, check_modules, chosen
from models.pruning.groups import Anatomy, anatomy_of
from models.quantization.activations import Largest, round_inputs
from models.quantization.folding import fold
from models.quantization.methods.round_to_nearest import RoundToNearest
from models.quantization.proof import bits_per_weight, check_held, divergence
from models.quantization.quantizer import Quantizer
from models.quantization.scheme import QuantizedMatrix, Scheme
from models.quantization.stored import Outline, QuantizedWeights, join, read_quantized
from models.representations import decoder_layers
from models.save import save_model
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.calibration import Calibration
from pipeline.data.source import DataSource, source_key
from pipeline.forecast.workload import Reads
from pipeline.planned import outline_of
from pipeline.progress import shown
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.layer_by_layer import FinishedLayers, LayerByLayer, check_reached, told_of_experts


@dataclass(frozen=True)
class Quantize(Stage):
    """The result is an ordinary checkpoint of dequantized values; the integers lie beside it."""

    makes: ClassVar[Makes] = "model"
    immaterial: ClassVar[frozenset[str]] = frozenset({"calibration.batch_size"})

    model: str  # folder or hub id
    data: DataSource  # of whose training split some text is the calibration
    scheme: Scheme
    quantizer: Quantizer
    calibration: Calibration
    skip: Sequence[str] = ()
    dtype: str = "float32"
    trust_remote_code: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.layer_by_layer  # its own checks

    @property
    def layer_by_layer(self) -> LayerByLayer:
        return LayerByLayer(
            "quantize",
            self.model,
            self.data,
            self.quantizer.reading is not None or self.scheme.activations is not None,
            self.calibration,
            self.dtype,
            self.trust_remote_code,
            self.seed,
        )

    @classmethod
    def multiple(cls, settings: Mapping[str, Any]) -> int:
        scheme = instantiate(settings["scheme"], _convert_="all")
        return scheme.multiple if isinstance(scheme, Scheme) else 1  # its check refuses others

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return self.layer_by_layer.parents()

    def content(self) -> str:
        """Hash of the calibration text."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        if outline_of(Path(context.config_folder(self.model))) is not None:
            raise Refusal(
                f"stages.{context.stage}.model={self.model}: its weights are quantized already; give the "
                f"model it was made of"
            )
        with self._planning(context) as fits:
            return self.layer_by_layer.check(context, fits)

    def workload(self, context: Context) -> Reads | None:
        with self._planning(context) as fits:
            return self.layer_by_layer.workload(context, fits)

    @contextmanager
    def _planning(self, context: Context) -> Iterator[Callable[[Any], None]]:
        """What looks at the model whose matrices are quantized, and plans them for later stages."""
        taken: dict[str, tuple[int, int]] = {}

        def fits(model: Any) -> None:
            mine = chosen(model, self.skip, "quantize.skip")
            for matrix in mine:
                outputs, inputs = matrix.of(model.get_parameter(matrix.parameter)).shape
                taken[str(matrix)] = (outputs, inputs)
            self._check_fits(model, mine)

        try:
            yield fits
        finally:
            if taken:  # of a scheme that is refused, too: formats then say whether they take it
                context.plan_quantized(Outline(taken, self.scheme).as_json())

    def prepare(self, context: Context) -> None:
        """There are no other ranks."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        dtype = DTYPES[self.dtype]
        tokenizer, given, batches = self.layer_by_layer.open(context)
        model = given.model
        taken = self._chosen(model)
        anatomy = None if self.quantizer.scales is None else anatomy_of(model)
        finished, count = FinishedLayers(context.work, model), len(decoder_layers(model))
        finished.report(context.stage)
        rounding: list[RemovableHandle] = []
        for turn in shown(in_turn(model, batches, given.weights), count, context.stage):
            mine = [matrix for matrix in taken if matrix.layer == turn.number]
            rounding += self._take(context, finished, turn, mine, anatomy)
        for handle in rounding:
            handle.remove()
        experts = told_of_experts(context.stage, finished.routed(taken), "round to nearest")
        manifest = context.manifest(self.makes)

        def build(folder: Path) -> None:
            save_model(model, tokenizer, folder, finished.state(), dtype)
            join([_part(context, number) for number in range(count)], folder / artifact.QUANTIZED)
            again, held = (
                self.layer_by_layer.load(context, str(folder), "made"),
                read_quantized(folder / artifact.QUANTIZED),
            )
            check_held(again.model, held, dtype, context.stage, again.weights)
            manifest["certificates"] = {"weights_bit_equal": True}
            bits = bits_per_weight(again.model, held, dtype)
            manifest["metrics"] = {"parameters": parameter_count(again.model), "bits_per_weight": bits, **experts}
            if self.scheme.activations is not None:
                manifest["metrics"] |= divergence(given, again, held, batches)
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        bits = manifest["metrics"]["bits_per_weight"]
        print(f"{context.stage}: {len(taken)} matrices to {self.scheme}; {bits:.2f} bits per weight of the whole model")

    def _chosen(self, model: Any) -> list[Matrix]:
        """The matrices that are quantized. Raises Refusal for settings that do not fit this model."""
        taken = chosen(model, self.skip, "quantize.skip")
        self._check_fits(model, taken)
        return taken

    def _check_fits(self, model: Any, taken: Sequence[Matrix]) -> None:
        if self.quantizer.reading is not None:
            check_experts_read(
                model, taken, f"the quantizer {type(self.quantizer).__name__}", "quantizer=round_to_nearest"
            )
        if self.scheme.activations is not None:
            check_modules(taken, f"scheme={self.scheme}", "scheme=w8a16")
        if self.quantizer.scales is not None:
            try:
                anatomy_of(model)
            except Refusal as problem:
                raise Refusal(
                    f"the quantizer {type(self.quantizer).__name__}: which parts its scales could be folded into is "
                    f"not known ({problem}); use quantizer=gptq"
                ) from None
        self.scheme.weights.check(
            {str(matrix): matrix.of(model.get_parameter(matrix.parameter)).shape[-1] for matrix in taken}
        )

    @torch.no_grad()
    def _take(
        self, context: Context, finished: FinishedLayers, turn: Turn, taken: Sequence[Matrix], anatomy: Anatomy | None
    ) -> list[RemovableHandle]:
        """Quantize one layer; or take the result of a run that was killed after it. The handles round the inputs of
        its matrices from now on."""
        path = _part(context, turn.number)
        if turn in finished:
            finished.restore(turn)
        else:
            activations: dict[str, Any] = {}
            if self.quantizer.reading is not None:
                activations = turn.read(self.quantizer.reading, any(matrix.slot is not None for matrix in taken))
                check_reached(context.stage, taken, activations)
            if anatomy is not None and self.quantizer.scales is not None:
                activations = fold(anatomy, turn, taken, activations, self.quantizer.scales, self.scheme.weights)
            made: dict[str, QuantizedMatrix] = {}
            for matrix in taken:
                weight_OI = matrix.of(finished.model.get_parameter(matrix.parameter))
                few = turn.routed.get(matrix.place, LEAST_TOKENS) < LEAST_TOKENS
                made[str(matrix)] = (RoundToNearest() if few else self.quantizer).quantized(
                    weight_OI, self.scheme.weights, activations.get(matrix.place)
                )
                weight_OI.copy_(made[str(matrix)].dequantized().to(weight_OI))
            input_scales = self._input_scales(context, turn, taken)
            with written_aside(path) as aside:
                QuantizedWeights(self.scheme, made, input_scales).write(aside)
            finished.keep(turn, path)
        if self.scheme.activations is None:
            return []
        handles, found = [], read_quantized(path)
        for matrix in taken:  # later layers get the outputs of rounded inputs
            module: nn.Module = turn.layer.get_submodule(matrix.name)
            handles.append(round_inputs(module, self.scheme.activations, found.input_scales.get(str(matrix))))
        return handles

    def _input_scales(self, context: Context, turn: Turn, taken: Sequence[Matrix]) -> dict[str, Tensor]:
        """The scales of static activations, of a layer whose weights are quantized already; matrices that share an
        input have the same."""
        if self.scheme.activations is None or self.scheme.activations.dynamic:
            return {}
        found = turn.read(Largest, experts=False)
        check_reached(context.stage, taken, found)
        return {str(matrix): self.scheme.activations.scale(found[matrix.name].largest_I.amax()) for matrix in taken}


def _part(context: Context, number: int) -> Path:
    """The integers of one layer, while the stage runs."""
    return context.work / f"quantized-{number:05d}.safetensors"
