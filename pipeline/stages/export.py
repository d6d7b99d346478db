"""Write a finished model in the formats that others serve, and certify each on the files that were written."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate
from torch import Tensor

from models.errors import Problems, Refusal
from models.files import remove
from models.formats.certificate import Tolerances
from models.formats.checkpoint import dtype_of
from models.formats.container import check_installed
from models.formats.format import Format, Plan
from models.load import DTYPES, empty_model, parameter_count
from models.matrices import matrices
from models.measure import Speed, pieces
from pipeline import artifact
from pipeline.alone import Alone
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.prepared import sequences_of
from pipeline.data.rendering import tokenizer_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.forecast.workload import Reads
from pipeline.planned import architecture_of, config_to_change, outline_of
from pipeline.progress import shown
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.exporter import Exporter

_TEXTS = 64  # documents that a container's own tokenizer is tried on
_QUANTIZERS = ("transformers.quantizers.auto", "torchao.quantization", "compressed_tensors")


@dataclass(frozen=True)
class Export(Stage):
    """One folder for each format, complete in itself. Where integers lie beside the model, they are packed as they
    are."""

    makes: ClassVar[Makes] = "exports"

    model: str  # folder or hub id
    data: DataSource  # text that the certificates are measured on
    formats: Mapping[str, Format | None] | None  # folder → what is written there; None: nothing
    samples: int = 8  # documents of it
    length: int = 128  # tokens of each sample, at most
    dtype: str | None = None  # of what is not quantized; None: the model's
    logits_tolerance: float = 0.05  # as a share of the largest logit
    kl_tolerance: float = 1e-3  # nats for each token
    rounded_kl_tolerance: float = 0.5  # likewise, where a container was asked to round
    speed: Speed = field(default_factory=Speed)  # as it is measured for the card

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise Refusal(f"export.{name}={getattr(self, name)}: need at least {least}")
        for name in ("logits_tolerance", "kl_tolerance", "rounded_kl_tolerance"):
            if not getattr(self, name) > 0:
                raise Refusal(f"export.{name}={getattr(self, name)}: need a number above 0")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise Refusal(f"export.dtype={self.dtype}: need one of {', '.join(DTYPES)}, or null for the model's")
        if not self._formats:
            raise Refusal("formats: none is left; choose some, e.g. format=[huggingface,gptq]")
        for name, form in self._formats.items():
            if not isinstance(form, Format):
                raise Refusal(
                    f"formats.{name}: {form} is no format; choose one of conf/format, e.g. format=[gguf], or "
                    f"leave it out with formats.{name}=null"
                )
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise Refusal(f"formats.{name}: it names a folder; use letters, digits, _, - and .")

    @property
    def _formats(self) -> dict[str, Format]:
        return {name: form for name, form in (self.formats or {}).items() if form is not None}

    @classmethod
    def multiple(cls, settings: Mapping[str, Any]) -> int:
        return math.lcm(*(form.multiple for form in cls.exports(settings).values()))

    @classmethod
    def exports(cls, settings: Mapping[str, Any]) -> Mapping[str, Format]:
        chosen = {name: node for name, node in (settings["formats"] or {}).items() if node is not None}
        made = {name: instantiate(node, _convert_="all") for name, node in chosen.items()}
        return {name: form for name, form in made.items() if isinstance(form, Format)}  # its check refuses others

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return {"model": self.model, **self.data.made_by_stages}

    def content(self) -> str:
        """Hash of the text that certificates are measured on."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        plan = self._plan(context)
        problems = Problems()
        limit = getattr(plan.config, "max_position_embeddings", None)
        if limit and limit < self.length:
            problems.add(
                f"export.length={self.length}: the model reads at most {limit} (max_position_embeddings); use "
                f"export.length={limit}"
            )
        for name, form in self._formats.items():
            own, setting = Problems(), f"{context.setting(context.stage, 'formats')}.{name}"
            with problems:
                check_installed(setting, form)
            with own:
                form.check(plan)
            for line in own.lines:  # a format does not know its name in this run
                problems.add(re.sub(r"\bformat\.(?=\w)", f"{setting}.", line))
        problems.tell()
        return StagePlan(
            model=plan.config.model_type,
            parameters=parameter_count(empty_model(plan.config)),
            data=corpus,
            until=", ".join(self._formats),
            commits={"model": getattr(plan.config, "_commit_hash", None)},
        )

    def workload(self, context: Context) -> Reads:
        setting = context.setting(context.stage, "model")
        config = architecture_of(context, self.model, "model", setting=setting)
        dtype, tokens = self.dtype or dtype_of(config), self.samples * self.length
        return Reads(model=config, dtype=dtype, rows=1, length=self.length, tokens=tokens, several=False)

    def _plan(self, context: Context) -> Plan:
        """What is known of the model without its weights, in the check or later."""
        config = config_to_change(context, self.model, False)
        folder = Path(context.config_folder(self.model))
        outline = outline_of(folder)
        shapes = {} if outline is None else dict(outline.shapes)
        own = dtype_of(config)
        if (own, self.dtype) == ("float16", "bfloat16"):
            raise Refusal(
                f"stages.{context.stage}.dtype={self.dtype}: the model is {own}, which it would round; leave it null"
            )
        config.dtype = DTYPES[self.dtype or own]
        if outline is None:
            whole = empty_model(config)
            for matrix in matrices(whole):
                outputs, inputs = matrix.of(whole.get_parameter(matrix.parameter)).shape
                shapes[str(matrix)] = (outputs, inputs)
            return Plan(config, shapes, None)
        return Plan(config, shapes, outline.scheme, outline.ggml)

    def prepare(self, context: Context) -> None:
        """There are no other ranks."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        folder = local_folder(self.model)
        plan = self._plan(context)
        samples, texts = self._samples(context, folder)
        exporter = Exporter(
            context,
            self.model,
            folder,
            artifact.quantized_file(folder),
            plan.scheme.activations if plan.scheme else None,
            dtype_of(plan.config),
            samples,
            texts,
            Tolerances(self.logits_tolerance, self.kl_tolerance, self.rounded_kl_tolerance),
            self.speed,
            # A package that is missing is passed over, and is none of these formats' needs.
            Alone(["models.formats.certificate", *_QUANTIZERS]),
        )
        for name in shown(list(self._formats), len(self._formats), context.stage):
            if not _whole(context, name):
                exporter.make(name, self._formats[name])
        manifests = {name: json.loads((context.work / name / artifact.MANIFEST).read_text()) for name in self._formats}
        manifest = context.manifest(self.makes)
        manifest["certificates"] = {name: each["certificates"] for name, each in manifests.items()}
        manifest["metrics"] = {
            "parameters": parameter_count(empty_model(plan.config)),
            "formats": {name: each["metrics"] for name, each in manifests.items()},
        }

        def build(out: Path) -> None:
            for name in self._formats:
                ignore = shutil.ignore_patterns(artifact.SEALS)
                shutil.copytree(context.work / name, out / name, copy_function=_linked, ignore=ignore)
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)

    def _samples(self, context: Context, folder: Path) -> tuple[list[Tensor], list[str]]:
        """Int64[T] each, the beginnings of documents, of the test split where there is one; and more of these documents
        as whole texts."""
        tokenizer = tokenizer_of(str(folder), self.data)
        found = list(itertools.islice(self._documents(context, tokenizer), max(self.samples, _TEXTS)))
        if not found:
            raise Refusal(f"{context.stage}: no text of two tokens in data; give more")
        return [ids[: self.length] for ids in found[: self.samples]], [_text(tokenizer, ids) for ids in found[:_TEXTS]]

    def _documents(self, context: Context, tokenizer: Any) -> Iterator[Tensor]:
        """Int64[T] each: those of the first split that has any."""
        splits = [split for split in ("test", "validation") if self.data.holds(split)]
        for split in [*splits, "train"]:
            sequences, _, _ = sequences_of(self.data, split, tokenizer, context.data_folder)
            some = False
            for number in range(len(sequences)):
                batch = collate([sequences.arrays(number)], pad_token=pad_token(tokenizer))
                for ids, *_ in pieces(batch):
                    if len(ids) > 1:
                        some = True
                        yield ids
            if some:
                return


def _whole(context: Context, name: str) -> bool:
    """Whether a run that was killed has made this format. One that was changed since is told, and removed."""
    folder = context.work / name
    if not folder.exists() or artifact.sealed(folder):
        return folder.exists()
    print(f"{context.stage}: {folder} was changed since it was written; it is made again", flush=True)
    remove(folder)
    return False


def _text(tokenizer: Any, ids: Tensor) -> str:
    """Without the tokens that begin and end it, which tokenizing it adds."""
    tokens: list[int] = ids.tolist()
    tokens = tokens[1:] if tokens[0] == tokenizer.bos_token_id else tokens
    tokens = tokens[:-1] if tokens and tokens[-1] == tokenizer.eos_token_id else tokens
    text: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return text.strip("\ufffd")  # a document may be cut inside a letter


def local_folder(model: str) -> Path:
    """The folder itself, or a hub id's files once they are downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def _linked(source: str, target: str) -> str:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
