"""Quantize the weights of a model's layers, layer by layer, and prove that the result is made of its integers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.errors import Refusal
from models.heads import head_of
from models.layerwise import Passage, Turn, in_turn
from models.load import DTYPES, parameter_count, save_model
from models.matrices import Matrix, check_read, chosen
from models.objectives.chunked import objective_sum
from models.objectives.forward_kl import ForwardKL
from models.objectives.signal import Dense
from models.offloaded import Offloaded
from models.pruning.groups import Anatomy, anatomy_of
from models.quantization.activations import Largest, attach, round_inputs
from models.quantization.folding import fold
from models.quantization.proof import bits_per_weight, check_held
from models.quantization.quantizer import Quantizer
from models.quantization.scheme import QuantizedMatrix, Scheme
from models.quantization.stored import Outline, QuantizedWeights, join, read_quantized
from models.representations import decoder_layers
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.calibration import Calibration
from pipeline.data.source import DataSource, source_key
from pipeline.layer_by_layer import FinishedLayers, LayerByLayer
from pipeline.planned import outline_of
from pipeline.progress import shown
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan


@dataclass(frozen=True)
class Quantize(Stage):
    """The result is an ordinary checkpoint of dequantized values; the integers lie beside it."""

    makes: ClassVar[Makes] = "model"

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
        _ = self._walk  # its own checks

    @property
    def _walk(self) -> LayerByLayer:
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

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return self._walk.parents()

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        if outline_of(Path(context.config_folder(self.model))) is not None:
            raise Refusal(
                f"stages.{context.stage}.model={self.model}: its weights are quantized already; give the "
                f"model it was made of"
            )
        taken: dict[str, tuple[int, int]] = {}

        def fits(model: Any) -> None:
            for matrix in self._chosen(model):
                outputs, inputs = matrix.of(model.get_parameter(matrix.parameter)).shape
                taken[str(matrix)] = (outputs, inputs)

        told = self._walk.check(context, fits)
        context.plan_quantized(Outline(taken, self.scheme).as_json())
        return told

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        dtype = DTYPES[self.dtype]
        tokenizer, given, batches = self._walk.open(context)
        model = given.model
        taken = self._chosen(model)
        anatomy = None if self.quantizer.scales is None else anatomy_of(model)
        finished, count = FinishedLayers(context.work, model), len(decoder_layers(model))
        finished.tell(context.stage)
        rounding: list[RemovableHandle] = []
        for turn in shown(in_turn(model, batches, given.weights), count, context.stage):
            mine = [matrix for matrix in taken if matrix.layer == turn.number]
            rounding += self._take(context, finished, turn, mine, anatomy)
        for handle in rounding:
            handle.remove()
        manifest = context.manifest(self.makes)

        def build(folder: Path) -> None:
            save_model(model, tokenizer, folder, finished.state(), dtype)
            join([_part(context, number) for number in range(count)], folder / artifact.QUANTIZED)
            again, held = self._walk.load(context, str(folder), "made"), read_quantized(folder / artifact.QUANTIZED)
            check_held(again.model, held, dtype, context.stage, again.weights)
            manifest["certificates"] = {"weights_bit_equal": True}
            bits = bits_per_weight(again.model, held, dtype)
            manifest["metrics"] = {"parameters": parameter_count(again.model), "bits_per_weight": bits}
            if self.scheme.activations is not None:
                manifest["metrics"] |= _price(given, again, held, batches)
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)
        bits = manifest["metrics"]["bits_per_weight"]
        print(f"{context.stage}: {len(taken)} matrices to {self.scheme}; {bits:.2f} bits per weight of the whole model")

    def _chosen(self, model: Any) -> list[Matrix]:
        """The matrices that are quantized. Raises Refusal for what cannot be asked of this model."""
        taken = chosen(model, self.skip, "quantize.skip")
        if self.quantizer.reading is not None:
            check_read(taken, f"quantizer={type(self.quantizer).__name__}", "quantizer=round_to_nearest")
        if self.scheme.activations is not None:
            check_read(taken, f"scheme={self.scheme}", "scheme=w8a16")
        if self.quantizer.scales is not None:
            try:
                anatomy_of(model)
            except Refusal as problem:
                raise Refusal(
                    f"quantizer={type(self.quantizer).__name__}: which parts its scales could be folded into is not "
                    f"known ({problem}); use quantizer=gptq"
                ) from None
        widths = {str(matrix): matrix.of(model.get_parameter(matrix.parameter)).shape[-1] for matrix in taken}
        for name, inputs in widths.items():
            self.scheme.weights.check(name, inputs, widths.values())
        return taken

    @torch.no_grad()
    def _take(
        self, context: Context, finished: FinishedLayers, turn: Turn, taken: Sequence[Matrix], anatomy: Anatomy | None
    ) -> list[RemovableHandle]:
        """Quantize one layer; or, where a run that was killed had done so, take what it left. The handles
        round the inputs of its matrices from now on."""
        path = _part(context, turn.number)
        if turn in finished:
            finished.restore(turn)
        else:
            read: dict[str, Any] = {} if self.quantizer.reading is None else turn.read(self.quantizer.reading)
            if self.quantizer.reading is not None:
                _check_reached(context, taken, read)
            if anatomy is not None and self.quantizer.scales is not None:
                read = fold(anatomy, turn, taken, read, self.quantizer.scales, self.scheme.weights)
            made: dict[str, QuantizedMatrix] = {}
            for matrix in taken:
                weight_OI = matrix.of(finished.model.get_parameter(matrix.parameter))
                made[str(matrix)] = self.quantizer.quantized(weight_OI, self.scheme.weights, read.get(matrix.name))
                weight_OI.copy_(made[str(matrix)].dequantized().to(weight_OI))
            input_scales = self._input_scales(context, turn, taken)
            QuantizedWeights(self.scheme, made, input_scales).write(path)
            finished.keep(turn)  # last: with it the layer counts as done
        if self.scheme.activations is None:
            return []
        handles, found = [], read_quantized(path)
        for matrix in taken:  # what comes after reads what these give then
            module: nn.Module = turn.layer.get_submodule(matrix.name)
            handles.append(round_inputs(module, self.scheme.activations, found.input_scales.get(str(matrix))))
        return handles

    def _input_scales(self, context: Context, turn: Turn, taken: Sequence[Matrix]) -> dict[str, Tensor]:
        """Of a layer whose weights are quantized; matrices that share an input have the same."""
        if self.scheme.activations is None or self.scheme.activations.dynamic:
            return {}
        read = turn.read(Largest)
        _check_reached(context, taken, read)
        return {str(matrix): self.scheme.activations.scale(read[matrix.name].largest_I.amax()) for matrix in taken}


@torch.no_grad()
def _price(parent: Offloaded, made: Offloaded, held: QuantizedWeights, batches: Sequence[Tensor]) -> dict[str, float]:
    """KL of the model's next tokens from its parent's, nats a token of the calibration rows: with quantized weights,
    and with quantized activations too."""
    want = Passage(parent.model, batches, parent.weights).last()
    sums = {"kl_of_weights": 0.0, "kl_with_activations": 0.0}
    for name in sums:
        handles = attach(made.model, held) if name == "kl_with_activations" else []
        got = Passage(made.model, batches, made.weights).last()
        for ids, hidden, of_parent in zip(batches, got, want, strict=True):
            signal = Dense(of_parent, head_of(parent.model))
            kl, _ = objective_sum(ForwardKL(temperature=1.0), hidden, head_of(made.model), ids, signal)
            sums[name] += float(kl)
        for handle in handles:
            handle.remove()
    tokens = sum(ids.numel() for ids in batches)
    return {name: total / tokens for name, total in sums.items()}


def _part(context: Context, number: int) -> Path:
    """Of one layer, while the stage runs."""
    return context.work / f"quantized-{number:05d}.safetensors"


def _check_reached(context: Context, taken: Sequence[Matrix], read: Mapping[str, Any]) -> None:
    for matrix in taken:
        if matrix.name not in read:
            raise Refusal(
                f"{context.stage}: no calibration token reaches {matrix}; take more rows, or skip=[{matrix.name}]"
            )
