"""What the stages share that change a model layer by layer: the model, calibration text, and finished layers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import Problems, Refusal
from models.experts import LEAST_TOKENS
from models.files import written_aside
from models.layerwise import Turn
from models.load import DTYPES, empty_model, parameter_count
from models.matrices import Matrix, name_of_layers, of_no_kind
from models.offloaded import Offloaded, load_offloaded
from models.representations import decoder_layers
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.calibration import Calibration
from pipeline.data.prepared import sequences_of
from pipeline.data.rendering import tokenizer_of
from pipeline.data.source import DataSource, check_source
from pipeline.forecast.workload import Reads
from pipeline.planned import architecture_of, config_to_change
from pipeline.stages.stage import Plan


@dataclass(frozen=True)
class LayerByLayer:
    """The model that a stage changes layer by layer, and its calibration text."""

    stage: str  # the name that its settings are called by in messages
    model: str
    data: DataSource
    reads: bool  # whether calibration text is needed
    calibration: Calibration
    dtype: str
    trust_remote_code: bool
    seed: int

    def __post_init__(self) -> None:
        if not self.calibration.concatenated:  # batches without padding
            raise Refusal(f"{self.stage}.calibration.concatenated=false: samples need one length; use true")
        if self.dtype not in DTYPES:
            raise Refusal(f"{self.stage}.dtype={self.dtype}: need one of {', '.join(DTYPES)}")

    def parents(self) -> dict[str, str]:
        return {"model": self.model, **self.data.made_by_stages}

    def check(self, context: Context, fits: Callable[[Any], object]) -> Plan:
        """The stage's plan. `fits` is called with the model, without memory, and refuses what does not fit it. The
        model is planned where the stage refuses it, too, so that later stages say in the same message what they
        refuse."""
        corpus = check_source(context, self.data)
        config = config_to_change(context, self.model, self.trust_remote_code)
        problems, whole = Problems(), empty_model(config)
        with problems:
            if self.reads:
                self.calibration.check(context.stage, config, corpus)
        with problems:
            fits(whole)
        config.dtype = DTYPES[self.dtype]
        context.plan_model(config)
        problems.tell()
        return Plan(
            model=config.model_type,
            parameters=parameter_count(whole),
            data=corpus,
            until=str(self.calibration) if self.reads else "no text",
            warnings=[left] if (left := of_no_kind(whole)) else [],
            commits={"model": getattr(config, "_commit_hash", None)},
        )

    def workload(self, context: Context, fits: Callable[[Any], object]) -> Reads | None:
        """As `check`, from the model's config alone. Each layer reads the text before and after it is changed."""
        setting, trusted = context.setting(context.stage, "model"), self.trust_remote_code
        config = architecture_of(context, self.model, "model", setting=setting, trust_remote_code=trusted)
        fits(empty_model(config))
        config.dtype = DTYPES[self.dtype]
        context.plan_model(config)
        if not self.reads:
            return None
        return Reads.of(config, self.dtype, self.calibration, in_layers=True, several=False, times=2)

    def open(self, context: Context) -> tuple[Any, Offloaded, list[Tensor]]:
        """(tokenizer, model, batches): Int64[B, T] each, none where no text is needed."""
        tokenizer = tokenizer_of(self.model, self.data, self.trust_remote_code)
        batches = self._batches(context, tokenizer) if self.reads else []
        return tokenizer, self.load(context, self.model, "given"), batches

    def _batches(self, context: Context, tokenizer: Any) -> list[Tensor]:
        sequences, _, _ = sequences_of(self.data, "train", tokenizer, context.data_folder)
        samples = self.calibration.take(context.stage, sequences, np.random.default_rng(self.seed))
        ids = torch.tensor([sample["input_ids"] for sample in samples], device=context.device)
        return list(ids.split(self.calibration.batch_size))

    def load(self, context: Context, folder: str, role: str) -> Offloaded:
        return load_offloaded(
            folder,
            context.work / role,
            device=context.device,
            dtype=DTYPES[self.dtype],
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True)
class FinishedLayers:
    """Layers that are finished, on disk: a run that was killed continues after them, and the result is made of them."""

    folder: Path
    model: Any

    def report(self, stage: str) -> None:
        """Print where a run that was killed continues."""
        if count := len(list(self.folder.glob("layer-*.safetensors"))):
            print(f"{stage}: continues after {count} of {len(decoder_layers(self.model))} layers", flush=True)

    def __contains__(self, turn: Turn) -> bool:
        """One whose files were changed since is made again, with all that it decides after it."""
        path = self._path(turn.number)
        try:
            told = json.loads(path.with_suffix(".json").read_text())
            whole = {name: artifact.content_hash(self.folder / name) for name in told} == told
        except (OSError, ValueError, Refusal):
            whole = False
        if path.exists() and not whole:
            print(f"{path}: it was changed since it was written; the layers from it on are made again", flush=True)
            for later in sorted(self.folder.glob("layer-*"))[::-1]:
                if later.name >= path.stem:
                    later.unlink()
        return whole

    def keep(self, turn: Turn, *beside: Path) -> None:
        """With what was routed to its experts. `beside`: further files of this layer, which were written before."""
        path, name = self._path(turn.number), f"{name_of_layers(self.model)}.{turn.number}"
        tensors = {own: each.detach().contiguous() for own, each in turn.layer.named_parameters(prefix=name)}
        routed = {f"{name}.{place}": tokens for place, tokens in turn.routed.items()}
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"routed": json.dumps(routed)})
        told = {each.name: artifact.content_hash(each) for each in (path, *beside)}
        artifact.write_json(path.with_suffix(".json"), told)  # last: with it the layer counts as done

    @torch.no_grad()
    def restore(self, turn: Turn) -> None:
        for name, tensor in load_file(self._path(turn.number)).items():
            self.model.get_parameter(name).copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """The state dict of the whole model, once all layers are finished; theirs are mapped, not read."""
        found: dict[str, Tensor] = self.model.state_dict()
        for number in range(len(decoder_layers(self.model))):
            found |= load_file(self._path(number))
        return found

    def routed(self, taken: Iterable[Matrix]) -> dict[str, int]:
        """Calibration tokens that were sent to each expert's matrix of `taken`, once all layers are finished; nothing
        where no text was needed."""
        found: dict[str, int] = {}
        for number in range(len(decoder_layers(self.model))):
            with safe_open(self._path(number), "pt") as file:
                found |= json.loads((file.metadata() or {}).get("routed", "{}"))
        return {str(matrix): found[str(matrix)] for matrix in taken if str(matrix) in found}

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:05d}.safetensors"


def check_reached(stage: str, taken: Iterable[Matrix], activations: Mapping[str, Any]) -> None:
    """Refuse matrices that no token of the calibration text has reached; experts are told (`told_of_experts`)."""
    for matrix in taken:
        if matrix.slot is None and matrix.place not in activations:
            raise Refusal(
                f"{stage}: no calibration token reaches {matrix}; raise stages.{stage}.calibration.samples, or "
                f"skip=[{matrix.name}]"
            )


def told_of_experts(stage: str, routed: Mapping[str, int], instead: str) -> dict[str, Any]:
    """For the manifest: on how many tokens the matrices of experts were calibrated, by name → tokens, and which had
    fewer than LEAST_TOKENS, so that they were made by `instead`; these are printed too. Empty without experts."""
    if not routed:
        return {}
    few = {name: tokens for name, tokens in routed.items() if tokens < LEAST_TOKENS}
    if few:
        print(
            f"{stage}: {len(few):,} of {len(routed):,} matrices of experts were made by {instead}, as fewer than "
            f"{LEAST_TOKENS} calibration tokens are routed to them ({min(few, key=few.__getitem__)}: "
            f"{min(few.values())}); raise stages.{stage}.calibration.samples",
            flush=True,
        )
    counts = sorted(routed.values())
    figures = {
        "matrices": len(routed),
        "tokens": {"fewest": counts[0], "median": counts[len(counts) // 2], "most": counts[-1]},
        "least_tokens": LEAST_TOKENS,
        instead.replace(" ", "_"): len(few),
        "too_few_tokens": few,
    }
    return {"experts": figures}
