"""Measure every model of the run on the test split, each reloaded from the folder that was written."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.cache import HEADER
from models.errors import Refusal
from models.load import DTYPES, check_folder
from models.measure import Speed, measure_folder
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data import corpora
from pipeline.data.batch import collate, pad_token
from pipeline.data.rows import rows_of
from pipeline.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Evaluate:
    data: corpora.Data
    models: list[str] | None = None  # stage names or folders; None: every model this run has made, and the teacher
    teacher: Source | None = None
    compare: list[list[str]] = field(default_factory=list)  # pairs of stages to be put side by side
    dtype: str = "float32"
    batch_rows: int = 8
    speed: Speed = field(default_factory=Speed)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"evaluate.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if self.batch_rows < 1:
            raise Refusal(f"evaluate.batch_rows={self.batch_rows}: need at least 1")

    @property
    def _trusted(self) -> bool:
        """Whether code that comes with a model may run."""
        return self.teacher is not None and self.teacher.trust_remote_code

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        """Role → folder of every model that will be measured."""
        if self.models is not None:
            names = [Path(m).name for m in self.models]
            if twice := [m for m, name in zip(self.models, names, strict=True) if names.count(name) > 1]:
                raise Refusal(f"evaluate.models: {', '.join(twice)} would bear one name in the report; rename a folder")
            return {Path(m).name: m if "/" in m else str(context.run_dir / m) for m in self.models}
        order = context.config["order"]
        found = {
            name: str(context.run_dir / name)
            for name in order[: order.index(context.stage)]
            if name in context.planned or (artifact.read_manifest(context.run_dir / name) or {}).get("kind") == "model"
        }
        # A teacher that is served, or of which only a record is left, cannot be measured here.
        path = self.teacher.path if self.teacher is not None and self.teacher.runs_here else None
        if path and not (Path(path) / HEADER).is_file() and not context.produced_by(path):
            found = {"teacher": path, **found}
        return found

    def content(self) -> str:
        """Hash of the text it reads."""
        return corpora.content_key(self.data)

    def check(self, context: Context) -> dict[str, Any]:
        corpus = corpora.check(self.data)
        if not self.data.holdout and not self.data.test:
            raise Refusal("data.holdout=0 and no data.test: there is no text to measure on; give one of them")
        parents = self.parents(context)
        if not parents:
            raise Refusal(
                f"{context.stage} has no model to measure; run a training stage first or name folders in "
                f"stages.{context.stage}.models"
            )
        for role, path in parents.items():
            if not context.produced_by(path):
                check_folder(path, role)
        for pair in self.compare:
            if len(pair) != 2:
                raise Refusal(f"stages.{context.stage}.compare={pair}: need pairs like [distill, control]")
        return {"model": f"{len(parents)} models", "data": corpus}

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""

    def run(self, context: Context) -> None:
        # A server that has imported the libraries but run nothing: its children start clean and quickly.
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload(["models.measure"])
        rows = []
        for role, folder in self.parents(context).items():
            tokenizer = load_tokenizer(folder, self._trusted)
            packed, statistics, _ = rows_of(self.data, "test", tokenizer, context.data_folder)
            if not len(packed):
                raise Refusal("data.test: no text to measure on; give data.test or a data.holdout above 0")
            batches = [
                collate(
                    [packed[i] for i in range(at, min(at + self.batch_rows, len(packed)))],
                    pad_token=pad_token(tokenizer),
                )
                for at in range(0, len(packed), self.batch_rows)
            ]
            prompt = batches[0]["input_ids"][:1, : self.speed.prompt_tokens]
            with ProcessPoolExecutor(1, mp_context=processes) as pool:
                work = pool.submit(
                    measure_folder,
                    folder,
                    batches,
                    statistics["bytes"],
                    prompt,
                    context.device,
                    self.dtype,
                    self.speed,
                    self.data.packing,
                    self._trusted,
                )
                try:
                    measured = work.result()
                except BrokenProcessPool:
                    raise Refusal(
                        f"measuring {role} was killed, most likely for lack of memory; try "
                        f"stages.{context.stage}.dtype=bfloat16 or a smaller batch_rows"
                    ) from None
            manifest = artifact.read_manifest(Path(folder)) or {}
            rows.append(
                {
                    "stage": role,
                    "path": str(Path(folder).resolve()) if Path(folder).exists() else folder,
                    "parameters": measured.pop("parameters"),
                    "bytes": bytes_on_disk(folder),
                    **measured,
                    "seconds": manifest.get("seconds"),
                    "tokens": manifest.get("tokens"),
                }
            )
            print(f"{role}: perplexity {measured['perplexity']:.2f}", flush=True)
        artifact.publish(
            context.out,
            lambda folder: None,
            {
                **context.manifest("results"),
                "metrics": {"rows": rows, "comparisons": self._comparisons(rows)},
                "certificates": {},
            },
        )

    def _comparisons(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        by_stage = {row["stage"]: row["perplexity"] for row in rows}
        return [
            {
                "stage": one,
                "against": other,
                "perplexity": by_stage[one],
                "against_perplexity": by_stage[other],
                "difference": by_stage[one] - by_stage[other],
                "relative": by_stage[one] / by_stage[other] - 1,
            }
            for one, other in self.compare
            if one in by_stage and other in by_stage
        ]


def bytes_on_disk(folder: str) -> int | None:
    """Of the model itself: weights, config, tokenizer; not of what was logged beside it."""
    path = Path(folder)
    if not path.is_dir():
        return None
    return sum(
        p.stat().st_size for p in path.rglob("*") if p.is_file() and p.name not in (artifact.MANIFEST, "metrics.jsonl")
    )
