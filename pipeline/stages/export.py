"""Write a finished model in the containers that others serve, and show on the files what each is worth."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import Refusal
from models.formats.certificate import certify, refer
from models.formats.checkpoint import add_tokenizer, dtype_of
from models.formats.container import check_installed
from models.formats.format import Finished, Format, Plan, Written
from models.load import DTYPES, empty_model, load_config, parameter_count
from models.matrices import matrices
from models.measure import Speed, documents
from models.quantization.scheme import Activations
from models.quantization.stored import BlockWeights, open_quantized
from pipeline import artifact
from pipeline.alone import Alone
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.conversations import tokenizer_of
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.planned import config_to_change, outline_of
from pipeline.progress import shown
from pipeline.report import card, units
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan

_KILLED = "was killed, most likely for lack of memory; take a smaller export.tokens"


@dataclass(frozen=True)
class Export(Stage):
    """One folder for each format, complete in itself. Where integers lie beside the model, they are packed as they
    are."""

    makes: ClassVar[Makes] = "exports"

    model: str  # folder or hub id
    data: DataSource  # text that the certificates are measured on
    formats: Mapping[str, Format | None] | None  # folder → what is written there; None: nothing
    rows: int = 8
    tokens: int = 128  # of each row, at most
    dtype: str | None = None  # of what is not quantized; None: the model's
    logits_tolerance: float = 0.05  # as a share of the largest logit
    kl_tolerance: float = 1e-3  # nats for each token
    rounded_kl_tolerance: float = 0.5  # likewise, where a container was asked to round
    speed: Speed = field(default_factory=Speed)  # as it is measured for the card

    def __post_init__(self) -> None:
        for name, least in (("rows", 1), ("tokens", 2)):
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

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        return {"model": self.model, **self.data.made_by_stages}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        plan = self._plan(context)
        limit = getattr(plan.config, "max_position_embeddings", None)
        if limit and limit < self.tokens:
            raise Refusal(f"export.tokens={self.tokens}: the model reads at most {limit} (max_position_embeddings)")
        for name, form in self._formats.items():
            check_installed(f"{context.setting(context.stage, 'formats')}.{name}", form)
            form.check(plan)
        return StagePlan(
            model=plan.config.model_type,
            parameters=parameter_count(empty_model(plan.config)),
            data=corpus,
            until=", ".join(self._formats),
            commits={"model": getattr(plan.config, "_commit_hash", None)},
        )

    def _plan(self, context: Context) -> Plan:
        """What is known before a weight is read, in the check or later."""
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
        """Nothing to share: one process does it all."""
        context.work.mkdir(parents=True, exist_ok=True)

    def run(self, context: Context) -> None:
        begin = time.monotonic()
        folder = local_folder(self.model)
        plan = self._plan(context)
        dtype = dtype_of(plan.config)
        quantized = artifact.quantized_file(folder)
        rows = self._rows(context, folder)
        # A package that is missing is passed over, and is none of these formats' needs.
        quantizers = ["transformers.quantizers.auto", "torchao.quantization", "compressed_tensors"]
        alone = Alone(["models.formats.certificate", *quantizers])
        trained = plan.scheme.activations if plan.scheme else None
        for name in shown(list(self._formats), len(self._formats), context.stage):
            if (context.work / name / artifact.MANIFEST).exists():
                continue  # a run that was killed had got so far
            held = open_quantized(quantized) if quantized else None
            if isinstance(held, BlockWeights):
                finished = Finished(folder, None, dtype, held)
            else:
                finished = Finished(folder, held, dtype)
            refer_as = functools.partial(self._references, context, alone, finished, quantized, rows)
            self._make(context, name, finished, quantized, rows, refer_as, trained, alone)
        manifests = {name: json.loads((context.work / name / artifact.MANIFEST).read_text()) for name in self._formats}
        manifest = context.manifest(self.makes)
        manifest["certificates"] = {name: told["certificates"] for name, told in manifests.items()}
        manifest["metrics"] = {
            "parameters": parameter_count(empty_model(plan.config)),
            "formats": {name: told["metrics"] for name, told in manifests.items()},
        }

        def build(out: Path) -> None:
            for name in self._formats:
                shutil.copytree(context.work / name, out / name, copy_function=_linked)
            manifest["seconds"] = round(time.monotonic() - begin, 3)

        artifact.publish(context.out, build, manifest)

    def _rows(self, context: Context, folder: Path) -> list[Tensor]:
        """Int64[T] each: the beginnings of documents, of the test split where there is one."""
        tokenizer = tokenizer_of(str(folder), self.data)
        splits = [split for split in ("test", "validation") if self.data.holds(split)]
        found: list[Tensor] = []
        for split in [*splits, "train"]:
            rows, _, _ = sequences_of(self.data, split, tokenizer, context.data_folder)
            for number in range(len(rows)):
                batch = collate([rows[number]], pad_token=pad_token(tokenizer))
                found += [ids[: self.tokens] for ids, _ in documents(batch) if len(ids) > 1]
                if len(found) >= self.rows:
                    return found[: self.rows]
            if found:
                return found
        raise Refusal(f"{context.stage}: no text of two tokens in data; give more")

    def _references(
        self,
        context: Context,
        alone: Alone,
        finished: Finished,
        quantized: Path | None,
        rows: list[Tensor],
        activations: Activations | None,
    ) -> Path:
        """The model's own logits of the rows, with its activations rounded so; made once."""
        folder = context.work / (".references" + re.sub(r"\W+", "-", repr(activations)))
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            words = (str(finished.folder), quantized, finished.dtype, rows, folder, context.device, activations)
            alone(refer, *words, killed=f"{context.stage}: the model itself {_KILLED}")
            (folder / "done").touch()
        return folder

    def _make(
        self,
        context: Context,
        name: str,
        finished: Finished,
        quantized: Path | None,
        rows: list[Tensor],
        refer_as: Callable[[Activations | None], Path],
        trained: Activations | None,
        alone: Alone,
    ) -> None:
        """One export under work/, certified; nothing where it is not."""
        begin, form = time.monotonic(), self._formats[name]
        aside = context.work / f".{name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            written = form.write(finished, aside)
            add_tokenizer(finished.folder, aside)
            told = alone(
                certify,
                form,
                aside,
                replace(finished, quantized=None, blocks=None),
                quantized,
                rows,
                refer_as(written.activations),
                context.device,
                self.speed,
                written.otherwise,
                None if written.activations == trained else refer_as(trained),
                killed=f"{context.stage}: {name} {_KILLED}",
            )
            self._judge(context, name, told, written)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        manifest = context.manifest("export")
        del manifest["run_config"]  # the stage's manifest has it
        fallbacks = dict(written.fallbacks)
        if "kl_as_quantized" in told:
            how = fallbacks.get("activations", "activations are rounded in another way")
            fallbacks["activations"] = f"{how}; KL {told['kl_as_quantized']:.1e} from the model as it was quantized"
        odd, serving = told.pop("first_odd_weight"), told.pop("serving")
        manifest |= {
            "format": context.config["stages"][context.stage]["formats"][name],
            "certificates": {
                **told,
                "bits_per_weight": written.bits_per_weight,
                "fallbacks": fallbacks,
            },
            "metrics": {
                "parameters": parameter_count(empty_model(load_config(str(finished.folder)))),
                "bits_per_weight": written.bits_per_weight,
                "perplexity_reloaded": told["perplexity_reloaded"],
                "bytes": sum(path.stat().st_size for path in aside.rglob("*") if path.is_file()),
                **serving,
            },
            "seconds": round(time.monotonic() - begin, 3),
        }
        text = card.text(
            run=context.run_dir.name,
            name=name,
            model=self.model,
            manifest=manifest,
            device=_device(context),
            serving=form.serving(aside, str(context.out / name)),
        )
        (aside / artifact.CARD).write_text(text)
        artifact.write_json(aside / artifact.MANIFEST, manifest)
        os.rename(aside, context.work / name)
        rounded = "" if odd is None else ", quantized by the format itself"
        print(
            f"{context.stage}: {name}{rounded}: {written.bits_per_weight:.2f} bits per weight, "
            f"{units.size(manifest['metrics']['bytes'])}, KL {told['kl']:.1e}, perplexity "
            f"{told['perplexity_before']:.3f} → {told['perplexity_reloaded']:.3f}",
            flush=True,
        )

    def _judge(self, context: Context, name: str, told: dict[str, Any], written: Written) -> None:
        """A format that was asked to quantize plain weights may give another model, within
        `rounded_kl_tolerance`; everything else has to be the same.

        Runtimes round activations by scales of their own, and a number that falls to the other side moves its logits:
        then the distributions count alone.
        """
        if not told["weights_bit_equal"] and not written.rounded:
            raise Refusal(
                f"{context.stage}: {name}: {told['first_odd_weight']} is another one once reloaded; nothing was written"
            )
        moved = written.rounded or written.activations is not None
        allowed = math.inf if moved else self.logits_tolerance * max(told["largest_logit"], 1e-9)
        most_kl = (self.kl_tolerance, "kl_tolerance")
        if written.rounded:
            most_kl = (self.rounded_kl_tolerance, "rounded_kl_tolerance")
        for what, value, most, setting in (
            ("its logits differ by", told["logits_max_difference"], allowed, "logits_tolerance"),
            ("its divergence is", told["kl"], *most_kl),
        ):
            if not value <= most:
                raise Refusal(
                    f"{context.stage}: {name}: {what} {value:.1e} from the model's, and {most:.1e} is allowed "
                    f"(stages.{context.stage}.{setting}); nothing was written"
                )


def local_folder(model: str) -> Path:
    """A hub id's files, brought here."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))


def _device(context: Context) -> str:
    """The name of what the speed was measured on."""
    if context.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a CPU"


def _linked(source: str, target: str) -> str:
    """A second name for the file where the file system has such, a copy where not."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
