"""Make a teacher where there is none: a tokenizer and a small model, trained from scratch on the corpus."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoConfig

from models.errors import Refusal
from models.load import parameter_count
from models.objectives.cross_entropy import CrossEntropy
from models.student import check_counts, check_sizes, made_empty, write_fresh
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.tokenizer import load_tokenizer, train_tokenizer
from pipeline.forecast.workload import Trains
from pipeline.planned import text_bytes
from pipeline.stages.stage import Makes, Reading, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training import settings
from pipeline.training.prepare import prepare
from pipeline.training.recipe import Recipe
from pipeline.training.train import train


@dataclass(frozen=True)
class Tokenizer:
    """An existing tokenizer's folder or hub id, or the size of a byte-level BPE to train on the corpus."""

    path: str | None = None
    vocab_size: int = 2048


@dataclass(frozen=True)
class Pretrain(Stage):
    makes: ClassVar[Makes] = "model"
    on_demand: ClassVar[str] = "this run's own teacher, without another teacher.path"

    data: DataSource
    model: dict[str, Any]  # model_type and whatever numbers of its Hugging Face config
    training: settings.Training
    precision: str
    seed: int
    tokenizer: Tokenizer = field(default_factory=Tokenizer)

    def ranks(self, context: Context) -> int:
        return context.world

    def parents(self, context: Context) -> dict[str, str]:
        return ({"tokenizer": self.tokenizer.path} if self.tokenizer.path else {}) | self.data.made_by_stages

    def content(self) -> str:
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        warnings = settings.check(context, self.training, self.precision)
        corpus = check_source(context, self.data)
        if corpus["chat"] and not self.tokenizer.path:
            raise Refusal(
                f"{context.stage} trains its tokenizer on text, and the data are conversations; give "
                f"stages.{context.stage}.tokenizer.path=FOLDER, or teacher.path=FOLDER to distil from an existing "
                f"teacher"
            )
        vocabulary = len(load_tokenizer(self.tokenizer.path)) if self.tokenizer.path else self.tokenizer.vocab_size
        config = self._config(vocabulary)
        parameters = parameter_count(made_empty(config, "model"))
        settings.check_family(context, config)
        settings.check_packing(config, self.data, "model")
        context.plan_model(config)
        settings.check_disk(context, parameters, corpus, vocabulary)
        return StagePlan(
            model=config.model_type,
            parameters=parameters,
            data=corpus,
            until=self.training.length(),
            warnings=warnings,
        )

    def workload(self, context: Context) -> Trains:
        path = self.tokenizer.path
        config = self._config(len(load_tokenizer(path)) if path else self.tokenizer.vocab_size)
        context.plan_model(config)
        return Trains(recipe=self._recipe, student=config, text_bytes=text_bytes(context, self.data))

    def reading(self, context: Context, scratch: Path) -> Reading:
        return self.data, self._tokenizer(scratch), None

    def _tokenizer(self, folder: Path) -> Any:
        """The given one, or one that is trained and written to `folder`."""
        if self.tokenizer.path:
            return load_tokenizer(self.tokenizer.path)
        if folder.exists() and not artifact.sealed(folder):
            print(f"{folder}: the tokenizer was changed since it was trained; it is made again", flush=True)
            shutil.rmtree(folder)
        if not folder.exists():
            aside = folder.with_name(f".{folder.name}")
            train_tokenizer(self.data.texts("train"), self.tokenizer.vocab_size, aside)
            artifact.seal(aside)
            os.rename(aside, folder)
        return load_tokenizer(str(folder))

    def prepare(self, context: Context) -> None:
        tokenizer = self._tokenizer(context.work / "tokenizer")

        def start(folder: Any) -> None:
            config = self._config(len(tokenizer))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                setattr(config, name, getattr(tokenizer, name))
            write_fresh(config, tokenizer, folder, self.seed)

        prepare(context, self.data, tokenizer, start)

    def run(self, context: Context) -> None:
        train(context, self._recipe)

    @property
    def _recipe(self) -> Recipe:
        return Recipe(objective=CrossEntropy(), data=self.data, training=self.training, precision=self.precision)

    def _config(self, vocabulary: int) -> Any:
        values = dict(self.model)
        kind = values.pop("model_type", None)
        try:
            base = AutoConfig.for_model(kind)
            known = base.to_dict()
        except (ValueError, KeyError, TypeError):
            raise Refusal(
                f"pretrain.model.model_type={kind}: transformers knows no such family; llama is a good start"
            ) from None
        if unknown := [name for name in values if name not in known]:
            raise Refusal(f"model.{unknown[0]}: the {kind} config has no such number")
        check_counts(base, values, "model")
        check_sizes(values, "model")
        try:
            config = AutoConfig.for_model(kind, **values, vocab_size=vocabulary)
        except Exception as problem:  # each library has its own kinds of complaint about a value
            told = " ".join(str(problem).split())
            raise Refusal(f"pretrain.model: the {kind} config does not take it: {told}") from None
        settings.check_length(config, self.data, "model")
        return config
