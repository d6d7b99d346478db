"""One export: a folder that its format has written, certified in a fresh process, with a manifest and a card."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.files import remove
from models.formats.certificate import Tolerances, certify, refer
from models.formats.checkpoint import add_tokenizer
from models.formats.format import Finished, Format, Written
from models.load import empty_model, load_config, parameter_count
from models.measure import Speed
from models.quantization.scheme import Activations
from models.quantization.stored import BlockWeights, open_quantized
from pipeline import artifact
from pipeline.alone import Alone
from pipeline.context import Context
from pipeline.report import card, units

_KIND = "export"  # in the manifest of one export; an artifact's is what its stage makes
_KILLED = "was killed, most likely for lack of memory; take a smaller stages.{stage}.length"


@dataclass(frozen=True)
class Exporter:
    """Writes one model in any number of formats, each below `context.work`."""

    context: Context
    model: str  # as the stage's settings name it
    folder: Path  # where its checkpoint lies
    quantized: Path | None  # the file of its integers, where it is quantized
    activations: Activations | None  # of the scheme that it was quantized to
    dtype: str  # of what is not quantized
    samples: Sequence[Tensor]  # Int64[T] each: what certificates are measured on
    texts: Sequence[str]  # that a container's own tokenizer is tried on
    tolerances: Tolerances
    speed: Speed
    alone: Alone

    def make(self, name: str, form: Format) -> None:
        """The folder work/NAME, certified. Raises Refusal where the certificate fails, and leaves no folder then."""
        begin, context = time.monotonic(), self.context
        aside = context.work / f".{name}.partial"
        remove(aside)
        aside.mkdir()
        try:
            finished = self._finished()
            written = form.write(finished, aside)
            add_tokenizer(self.folder, aside)
            figures = self._certified(name, form, aside, written)
            self.tolerances.check(context.stage, name, figures, written)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        manifest = self._manifest(name, aside, written, figures)
        manifest["seconds"] = round(time.monotonic() - begin, 3)
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
        artifact.seal(aside)
        os.rename(aside, context.work / name)
        rounded = "" if figures["first_odd_weight"] is None else ", quantized by the format itself"
        print(
            f"{context.stage}: {name}{rounded}: {written.bits_per_weight:.2f} bits per weight, "
            f"{units.size(manifest['metrics']['bytes'])}, KL {figures['kl']:.1e}, perplexity "
            f"{figures['perplexity_before']:.3f} → {figures['perplexity_reloaded']:.3f}",
            flush=True,
        )

    def _finished(self) -> Finished:
        held = open_quantized(self.quantized) if self.quantized else None
        own = Path(self.model).resolve().is_relative_to(self.context.run_dir.resolve())
        name = self.context.run_dir.name if own else Path(self.model).name
        if isinstance(held, BlockWeights):
            return Finished(self.folder, None, self.dtype, held, name, self.texts)
        return Finished(self.folder, held, self.dtype, None, name, self.texts)

    def _certified(self, name: str, form: Format, folder: Path, written: Written) -> dict[str, Any]:
        """The figures of models.formats.certificate.certify."""
        same_rounding = written.activations == self.activations
        figures: dict[str, Any] = self.alone(
            certify,
            form,
            folder,
            Finished(self.folder, None, self.dtype),
            self.quantized,
            self.samples,
            self._references(written.activations),
            self.context.device,
            self.speed,
            written.otherwise,
            None if same_rounding else self._references(self.activations),
            killed=f"{self.context.stage}: {name} {_KILLED.format(stage=self.context.stage)}",
        )
        return figures

    def _references(self, activations: Activations | None) -> Path:
        """A folder with the model's own logits of the samples, its activations rounded so; made once."""
        context = self.context
        folder = context.work / (".references" + re.sub(r"\W+", "-", repr(activations)))
        if not artifact.sealed(folder):
            remove(folder)
            folder.mkdir()
            words = (str(self.folder), self.quantized, self.dtype, self.samples, folder, context.device, activations)
            killed = f"{context.stage}: the model itself {_KILLED.format(stage=context.stage)}"
            self.alone(refer, *words, killed=killed)
            artifact.seal(folder)
        return folder

    def _manifest(self, name: str, folder: Path, written: Written, figures: dict[str, Any]) -> dict[str, Any]:
        """The manifest of one export, without its seconds: of a part of what the stage makes, and of no artifact."""
        context, serving = self.context, figures["serving"]
        fallbacks = dict(written.fallbacks)
        if "kl_as_quantized" in figures:
            how = fallbacks.get("activations", "activations are rounded in another way")
            fallbacks["activations"] = f"{how}; KL {figures['kl_as_quantized']:.1e} from the model as it was quantized"
        return {
            "stage": context.stage,
            "kind": _KIND,
            **context.provenance(),
            "format": context.config["stages"][context.stage]["formats"][name],
            "certificates": {
                **{key: value for key, value in figures.items() if key not in ("first_odd_weight", "serving")},
                "bits_per_weight": written.bits_per_weight,
                "fallbacks": fallbacks,
            },
            "metrics": {
                "parameters": parameter_count(empty_model(load_config(str(self.folder)))),
                "bits_per_weight": written.bits_per_weight,
                "perplexity_reloaded": figures["perplexity_reloaded"],
                "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
                **serving,
            },
        }


def _device(context: Context) -> str:
    """The name of what the speed was measured on."""
    if context.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a CPU"
