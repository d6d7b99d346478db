"""What stages share that change a finished model by a little text: how the model is found, and rows of one length."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.errors import Refusal
from models.layerwise import Turn
from models.load import DTYPES, empty_model, parameter_count
from models.matrices import name_of_layers
from models.offloaded import Offloaded, load_offloaded
from models.quantization.record import Known, known, read_known
from models.representations import decoder_layers
from pipeline import artifact, planned
from pipeline.context import Context
from pipeline.data.conversations import tokenizer_of
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source
from pipeline.stages.stage import Plan

_AT_ONCE = 8  # rows in a batch


@dataclass(frozen=True)
class Walk:
    """Of a stage that goes through a model layer by layer: its model, and the text that the layers read."""

    stage: str  # as its settings are called
    model: str
    data: DataSource
    reads: bool  # whether text is needed
    rows: int
    tokens: int  # of each row
    dtype: str
    trust_remote_code: bool
    seed: int

    def __post_init__(self) -> None:
        for name, value, least in (("calibration_rows", self.rows, 1), ("calibration_tokens", self.tokens, 2)):
            if value < least:
                raise Refusal(f"{self.stage}.{name}={value}: need at least {least}")
        if self.dtype not in DTYPES:
            raise Refusal(f"{self.stage}.dtype={self.dtype}: need one of {', '.join(DTYPES)}")

    def parents(self) -> dict[str, str]:
        return {"model": self.model, **self.data.made_by_stages}

    def check(self, context: Context, fits: Callable[[Any], object]) -> Plan:
        """The stage's plan; `fits` refuses what cannot be asked of the model, which is without memory then."""
        corpus = check_source(context, self.data)
        config = config_of(context, self.model, self.trust_remote_code)
        if self.reads:
            check(config, self.tokens, self.stage)
            most = (corpus.get("train") or {}).get("tokens_at_most")
            if most is not None and not corpus["chat"] and most < self.rows * self.tokens:
                raise _too_short(self.stage, self.rows, self.tokens, f"{most:,} at most")
        whole = empty_model(config)
        fits(whole)
        config.dtype = DTYPES[self.dtype]
        context.plan_model(config)
        return Plan(
            model=config.model_type,
            parameters=parameter_count(whole),
            data=corpus,
            until=f"{self.rows} rows of calibration" if self.reads else "no text",
            commits={"model": getattr(config, "_commit_hash", None)},
        )

    def open(self, context: Context) -> tuple[Any, Offloaded, list[Tensor]]:
        """(tokenizer, model, batches): Int64[B, T] each, none where no text is needed."""
        tokenizer = tokenizer_of(self.model, self.data, self.trust_remote_code)
        found: list[Tensor] = []
        if self.reads:
            found = batches(context, self.data, tokenizer, (self.rows, self.tokens), self.seed, self.stage)
        return tokenizer, self.load(context, self.model, "given"), found

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
    """Layers whose turn is over, on disk: a run that was killed goes on with them, and the whole is made of them."""

    folder: Path
    model: Any

    def tell(self, stage: str) -> None:
        """Where a run that was killed goes on."""
        if count := len(list(self.folder.glob("layer-*.safetensors"))):
            print(f"{stage}: goes on after {count} of {len(decoder_layers(self.model))} layers", flush=True)

    def __contains__(self, turn: Turn) -> bool:
        return self._path(turn.number).exists()

    def keep(self, turn: Turn) -> None:
        path, name = self._path(turn.number), f"{name_of_layers(self.model)}.{turn.number}"
        aside = path.with_suffix(".partial")
        save_file({own: each.detach().contiguous() for own, each in turn.layer.named_parameters(prefix=name)}, aside)
        os.replace(aside, path)

    @torch.no_grad()
    def restore(self, turn: Turn) -> None:
        for name, tensor in load_file(self._path(turn.number)).items():
            self.model.get_parameter(name).copy_(tensor)

    def state(self) -> dict[str, Tensor]:
        """Of the whole model, once all layers are there; theirs are mapped, not read."""
        found: dict[str, Tensor] = self.model.state_dict()
        for number in range(len(decoder_layers(self.model))):
            found |= load_file(self._path(number))
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:05d}.safetensors"


def config_of(context: Context, model: str, trust_remote_code: bool) -> Any:
    """In the check: the config of a model that is there, weights and all, or that a stage before will make."""
    setting = f"stages.{context.stage}.model"
    config = planned.config_of(context, model, "model", setting=setting, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise Refusal(f"stages.{context.stage}.model={model}: its weights are packed; give the model it was made of")
    return config


def known_of(folder: Path) -> Known | None:
    """What is known before a weight is read of what a model that is there is made of, or one that a stage before plans;
    None where it is on no grid."""
    if (folder / artifact.GRID).is_file():
        return read_known(folder / artifact.GRID)
    if (folder / artifact.PLANNED_GRID).is_file():
        return known(json.loads((folder / artifact.PLANNED_GRID).read_text()))
    return None


def check(config: Any, tokens: int, stage: str) -> None:
    """Refuse rows that are longer than the model reads."""
    limit = getattr(config, "max_position_embeddings", None)
    if limit and limit < tokens:
        raise Refusal(
            f"{stage}.calibration_tokens={tokens}: the model reads at most {limit} tokens (max_position_embeddings)"
        )


def batches(
    context: Context, data: DataSource, tokenizer: Any, size: tuple[int, int], seed: int, stage: str
) -> list[Tensor]:
    """Int64[B, T] each, rows × tokens in all: training documents in an order drawn by the seed, laid end to end."""
    rows, _, _ = sequences_of(data, "train", tokenizer, context.data_folder)
    count, length = size
    tokens: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(rows)):
        tokens += rows[int(number)]["input_ids"]
        if len(tokens) >= count * length:
            break
    if len(tokens) < count * length:
        raise _too_short(stage, count, length, f"{len(tokens):,}")
    ids = torch.tensor(tokens[: count * length], device=context.device)
    return list(ids.view(count, length).split(_AT_ONCE))


def _too_short(stage: str, rows: int, tokens: int, found: str) -> Refusal:
    return Refusal(
        f"{stage}.calibration_rows={rows} of calibration_tokens={tokens}: need {rows * tokens:,} tokens, and "
        f"data.train has {found}; take fewer or shorter rows, or more text"
    )
