"""Measure every model of the run on the test split, each reloaded from the folder that was written.

With a task also how many of its queries each answers right without demonstrations, and the teacher with them; and how
much of the gap between the teacher's two figures a student has closed.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from models.certainty import LEAST
from models.errors import Refusal
from models.formats.format import Format
from models.load import DTYPES, check_model, empty_model, load_config, parameter_count
from models.measure import Speed, measure_export, measure_folder
from models.questions import PER
from models.student import Start
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.alone import Alone
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.tasks import Task
from pipeline.data.tokenizer import begin_token, load_tokenizer
from pipeline.forecast.workload import Reads
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.accuracy import UNSEEN, with_accuracy
from pipeline.steps.quiz import check_room, quiz_of
from pipeline.steps.to_measure import (
    bytes_on_disk,
    check_exports,
    check_unchanged,
    exports_to_measure,
    formats_of,
    models_to_measure,
)
from pipeline.steps.verdict import TEXT, Rule, Scored, relative_interval, verdict_on

BEFORE = "student before"
_KILLED = "measuring {role} was killed, most likely for lack of memory; try stages.{stage}.dtype=bfloat16, batch_size=1"


@dataclass(frozen=True)
class Evaluate(Stage):
    makes: ClassVar[Makes] = "results"
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size", "verdict.require"})

    data: DataSource
    models: list[str] | None = None  # stage names or folders; None: every model this run has made, and the teacher
    teacher: Source | None = None
    compare: list[list[str]] | None = None  # pairs of stages to be put side by side; None: none
    dtype: str = "float32"
    batch_size: int = 8
    speed: Speed | None = field(default_factory=Speed)  # None: neither speed nor memory is measured
    task: Task | None = None
    task_queries: int = 300  # at most, of the test's and of those that were trained on
    choices_per: str = "choice"  # of models.questions.PER: token or byte, for choices of unlike length
    before: Start | None = None  # a student, to be asked as it was before training
    verdict: Rule = field(default_factory=Rule)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise Refusal(f"evaluate.dtype={self.dtype}: need one of {', '.join(DTYPES)}")
        if self.choices_per not in PER:
            raise Refusal(f"evaluate.choices_per={self.choices_per}: need one of {', '.join(PER)}")
        for name in ("batch_size", "task_queries"):
            if getattr(self, name) < 1:
                raise Refusal(f"evaluate.{name}={getattr(self, name)}: need at least 1")

    @property
    def _trusted(self) -> bool:
        """Whether code that comes with a model may run."""
        return self.teacher is not None and self.teacher.trust_remote_code

    def ranks(self, context: Context) -> int:
        return 1

    def parents(self, context: Context) -> dict[str, str]:
        exports = {name: str(context.run_dir / name) for name, _ in self._exports(context).values()}
        return {**self._models(context), **exports, **self.data.made_by_stages}

    def _exports(self, context: Context) -> dict[str, tuple[str, Format]]:
        return exports_to_measure(context, self.models)

    def _models(self, context: Context) -> dict[str, str]:
        return models_to_measure(context, self.models, self.teacher)

    def content(self) -> str:
        """Hash of the text it reads."""
        key = source_key(self.data)
        return key if self.task is None else f"{key} {self.task.content_key()}"

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        if not self.data.holds("test"):
            node = self.data.node
            raise Refusal(
                f"{node}.holdout={self.data.holdout}: nothing falls to test; give {node}.test, or hold out more"
            )
        parents, exports = self._models(context), self._exports(context)
        check_exports(context, exports)
        if not {**parents, **exports}:
            raise Refusal(
                f"{context.stage} has no model to measure; run a training stage first or name folders in "
                f"stages.{context.stage}.models"
            )
        self._check_verdict([*parents, *exports])
        for path in parents.values():
            if not context.produced_by(path):
                check_model(path, self._setting(context, path), self._trusted)
                load_tokenizer(path, self._trusted)
            if context.produced_by(path) not in context.planned:  # else it is still to be made
                artifact.quantized_file(Path(path))  # refuses one that an older version has quantized
        for pair in self.compare or []:
            if len(pair) != 2:
                raise Refusal(f"stages.{context.stage}.compare={pair}: need a list of pairs, e.g. [[distill, control]]")
        self._check_task(context, parents)
        models = len(parents) + len(exports)
        return StagePlan(model=f"{models} model{'s' if models > 1 else ''}", data=corpus)

    def workload(self, context: Context) -> Reads | None:
        """Of the largest model that is measured, on as much text as is not known before it is read."""
        configs = [load_config(context.config_folder(path)) for path in self._models(context).values()]
        if not configs:
            return None
        largest = max(configs, key=lambda config: parameter_count(empty_model(config)))
        rows, length = self.batch_size, self.data.max_length
        return Reads(model=largest, dtype=self.dtype, rows=rows, length=length, tokens=None, several=False)

    def _setting(self, context: Context, path: str) -> str:
        """The setting that names this model, for messages."""
        if self.teacher is not None and path == self.teacher.path and self.models is None:
            return "teacher"
        return "model" if path == (context.config["model"] or {}).get("path") else "evaluate.models"

    def _check_task(self, context: Context, models: dict[str, str]) -> None:
        if self.task is None:
            return
        self.task.check()
        if not self.task.examples("test"):
            raise Refusal(
                "task.test: there is no query to measure on; give task.test, or a task.holdout above 0 and more queries"
            )
        for role, path in models.items():
            shown = role == self._teacher_role(context)
            check_room(self.task, role, context.config_folder(path), shown, self._trusted)

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""

    def run(self, context: Context) -> None:
        exports = self._exports(context)
        check_unchanged(context, exports)
        alone = Alone(["models.measure", "transformers.modeling_utils"])
        rows: list[dict[str, Any]] = []
        right: dict[str, dict[str, dict[str, bool]]] = {}
        scored: dict[str, Scored] = {}
        context.work.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=context.work) as start:
            folders = self._models(context)
            if self.before is not None and self.task is not None and self.teacher is not None:
                tokenizer = load_tokenizer(self.before.path or self.teacher.path, self._trusted)
                self.before.materialise(self.teacher.path, tokenizer, Path(start) / "start", self.seed)
                folders = {**folders, BEFORE: str(Path(start) / "start")}
            for role, folder in folders.items():
                row, scored[role], right[role] = self._model_row(context, role, folder, alone)
                rows.append(row)
        for role, found in exports.items():
            row, scored[role] = self._export_row(context, role, *found, alone)
            rows.append(row)
        if self.task is not None:
            rows = with_accuracy(rows, right, self._teacher_role(context), self.task)
        artifact.publish(
            context.out,
            lambda folder: None,
            {
                **context.manifest(self.makes),
                "metrics": {
                    "rows": rows,
                    "comparisons": comparisons(rows, scored, self.compare or []),
                    "verdicts": self._verdicts(context, scored),
                },
                "certificates": {},
            },
        )

    def _model_row(
        self, context: Context, role: str, folder: str, alone: Alone
    ) -> tuple[dict[str, Any], Scored, dict[str, dict[str, bool]]]:
        """The report's row, what its figures are made of, and by kind of question and query whether it was answered
        right."""
        measured = self._measured(context, role, folder, alone)
        right = measured.pop("right", {})
        scored = Scored.of(measured, right.get(UNSEEN, {}))
        manifest = artifact.read_manifest(Path(folder)) or {}
        if (bits := (manifest.get("metrics") or {}).get("bits_per_weight")) is not None:
            measured["bits_per_weight"] = bits  # as a container will hold it
            measured.pop("zeros", None)  # quantized weights have zeros, and are not sparse for it
        path = None if role == BEFORE else str(Path(folder).resolve()) if Path(folder).exists() else folder
        print(f"{role}: perplexity {measured['perplexity']:.2f}", flush=True)
        row = {
            "stage": role,
            "path": path,
            "parameters": measured.pop("parameters"),
            "bytes": bytes_on_disk(folder),
            **measured,
            "seconds": manifest.get("seconds"),
            "tokens": manifest.get("tokens"),
        }
        return row, scored, right

    def _export_row(
        self, context: Context, role: str, stage: str, form: Format, alone: Alone
    ) -> tuple[dict[str, Any], Scored]:
        folder, name = context.run_dir / role, role.partition("/")[2]
        tokenizer = load_tokenizer(str(folder), self._trusted)
        batches, text_bytes, prompt, unit = self._text(context, tokenizer)
        words = (form, str(folder), batches, text_bytes, prompt, context.device, self.speed)
        measured = alone(measure_export, *words, killed=_KILLED.format(role=role, stage=context.stage))
        measured["unit"] = unit
        scored = Scored.of(measured, {})
        metrics = formats_of(context, stage).get(name, {})
        print(f"{role}: perplexity {measured['perplexity']:.2f}", flush=True)
        row = {
            "stage": role,
            "path": str(folder.resolve()),
            "parameters": metrics.get("parameters"),
            "bytes": bytes_on_disk(str(folder)),
            "bits_per_weight": metrics.get("bits_per_weight"),
            **measured,
        }
        return row, scored

    def _verdicts(self, context: Context, scored: dict[str, Scored]) -> list[dict[str, Any]]:
        """On every model but the reference."""
        role = self._reference(context)
        return [
            verdict_on(name, each, role, scored[role], self.verdict.margin)
            for name, each in scored.items()
            if name not in (role, BEFORE)
        ]

    def _reference(self, context: Context) -> str:
        models = self._models(context)
        if self.verdict.reference is not None:
            return self.verdict.reference
        path = (context.config["model"] or {}).get("path")
        given = next((name for name, folder in models.items() if folder == path), None)
        return self._teacher_role(context) or given or next(iter([*models, *self._exports(context)]))

    def _check_verdict(self, measured: list[str]) -> None:
        reference = self.verdict.reference
        if reference is not None and reference not in measured:
            raise Refusal(f"verdict.reference={reference}: it is not measured; need one of {', '.join(measured)}")
        if self.verdict.require is not None and len(measured) < 2:
            told = f"verdict.require={self.verdict.require}: {measured[0]} alone is measured, so nothing is compared"
            raise Refusal(f"{told}; measure its reference too, or leave it out")

    def _text(self, context: Context, tokenizer: Any) -> tuple[list[dict[str, Any]], int, Any, str]:
        """(batches of the test split, bytes of their text, a prompt, what it is of which figures are known)."""
        packed, statistics, _ = sequences_of(self.data, "test", tokenizer, context.data_folder)
        if not len(packed):
            raise Refusal("data.test: no text to measure on; give data.test or a data.holdout above 0")
        documents = packed.documents(begin_token(tokenizer))
        unit = "conversation" if packed.columns.learnt else TEXT
        if int(documents[-1]) + 1 < LEAST:  # few and long: their windows stand for them
            documents, unit = np.arange(len(documents)), f"window of {self.data.max_length:,} tokens"
        rows = [
            {**packed.arrays(number), "documents": packed.document_of_tokens(number, documents)}
            for number in range(len(packed))
        ]
        batches = [
            collate(rows[at : at + self.batch_size], pad_token=pad_token(tokenizer))
            for at in range(0, len(rows), self.batch_size)
        ]
        prompt = batches[0]["input_ids"][:1, : (self.speed or Speed()).prompt_tokens]
        return batches, statistics["bytes"], prompt, unit

    def _measured(self, context: Context, role: str, folder: str, alone: Alone) -> dict[str, Any]:
        tokenizer = load_tokenizer(folder, self._trusted)
        batches, text_bytes, prompt, unit = self._text(context, tokenizer)
        quiz = None
        if self.task is not None:
            quiz = quiz_of(
                self.task,
                tokenizer,
                role=role,
                shown=role == self._teacher_role(context),
                queries=self.task_queries,
                batch_size=4 * self.batch_size,
                choices_per=self.choices_per,
            )
        record = artifact.quantized_file(Path(folder))
        settings = (context.device, self.dtype, self.speed, self.data.packing, self._trusted)
        words = (folder, batches, text_bytes, prompt, *settings, quiz, record)
        measured: dict[str, Any] = alone(measure_folder, *words, killed=_KILLED.format(role=role, stage=context.stage))
        return {**measured, "unit": unit}

    def _teacher_role(self, context: Context) -> str | None:
        path = self.teacher.path if self.teacher is not None else None
        return next((role for role, folder in self._models(context).items() if folder == path), None)


def comparisons(rows: list[dict[str, Any]], scored: dict[str, Scored], pairs: list[list[str]]) -> list[dict[str, Any]]:
    """The perplexities of two stages side by side, of those pairs that were measured, and the paired 95 % interval of
    their relative difference."""
    by_stage = {row["stage"]: row["perplexity"] for row in rows if "perplexity" in row}
    return [
        {
            "stage": one,
            "against": other,
            "perplexity": by_stage[one],
            "against_perplexity": by_stage[other],
            "difference": by_stage[one] - by_stage[other],
            "relative": by_stage[one] / by_stage[other] - 1,
            "relative_interval": relative_interval(scored[one], scored[other]),
        }
        for one, other in pairs
        if one in by_stage and other in by_stage
    ]
