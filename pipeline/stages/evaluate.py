"""Measure every model of the run on the test split, each reloaded from the folder that was written.

With a task also how many of its queries each answers right without demonstrations, and the teacher with them; and how
much of the gap between the teacher's two figures a student has closed.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate

from models.errors import Refusal
from models.formats.container import check_installed
from models.load import DTYPES, check_folder, load_config
from models.measure import Quiz, Speed, measure_export, measure_folder
from models.questions import PER, Question
from models.student import Start
from models.teachers.cache import HEADER
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.accuracy import SEEN, SHOWN, SHOWN_SEEN, UNSEEN, with_accuracy
from pipeline.alone import Alone
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.tasks import Task
from pipeline.data.tokenizer import load_tokenizer
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan

BEFORE = "student before"
LEFT_OUT = ("too_long", "demonstrations_left_out", "across")
_KILLED = "measuring {} was killed, most likely for lack of memory; try stages.evaluate.dtype=bfloat16, batch_size=1"


@dataclass(frozen=True)
class Evaluate(Stage):
    makes: ClassVar[Makes] = "results"
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    data: DataSource
    models: list[str] | None = None  # stage names or folders; None: every model this run has made, and the teacher
    teacher: Source | None = None
    compare: list[list[str]] = field(default_factory=list)  # pairs of stages to be put side by side
    dtype: str = "float32"
    batch_size: int = 8
    speed: Speed = field(default_factory=Speed)
    task: Task | None = None
    task_queries: int = 300  # at most, of the test's and of those that were trained on
    choices_per: str = "choice"  # of models.questions.PER: token or byte, for choices of unlike length
    before: Start | None = None  # a student, to be asked as it was before training
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

    def _exports(self, context: Context) -> dict[str, tuple[str, dict[str, Any]]]:
        """Role (stage/format) → stage and the format's node, of every export that will be measured.

        Formats are built from the run's own config: a manifest could name any class.
        """
        order, stages = context.config["order"], context.config["stages"]
        found = {}
        for name in order[: order.index(context.stage)]:
            if context.makes(name) != "exports":
                continue
            if name not in context.planned and artifact.read_manifest(context.run_dir / name) is None:
                continue
            for form, node in (stages[name]["formats"] or {}).items():
                role = f"{name}/{form}"
                if node is not None and (self.models is None or {name, role} & set(self.models)):
                    found[role] = (name, node)
        return found

    def _models(self, context: Context) -> dict[str, str]:
        """Role → folder of every model that will be measured."""
        if self.models is not None:
            exports = self._exports(context)
            wanted = [m for m in self.models if m not in exports and m not in {name for name, _ in exports.values()}]
            names = [Path(m).name for m in wanted]
            if twice := [m for m, name in zip(wanted, names, strict=True) if names.count(name) > 1]:
                raise Refusal(f"evaluate.models: {', '.join(twice)} would bear one name in the report; rename a folder")
            return {Path(m).name: m if "/" in m else str(context.run_dir / m) for m in wanted}
        order = context.config["order"]
        found = {
            name: str(context.run_dir / name)
            for name in order[: order.index(context.stage)]
            if (name in context.planned and context.makes(name) == "model")
            or (artifact.read_manifest(context.run_dir / name) or {}).get("kind") == "model"
        }
        # A teacher that is served, or of which only a record is left, cannot be measured here.
        path = self.teacher.path if self.teacher is not None and self.teacher.runs_here else None
        if path and not (Path(path) / HEADER).is_file() and not context.produced_by(path):
            found = {"teacher": path, **found}
        return found

    def content(self) -> str:
        """Hash of the text it reads."""
        told = source_key(self.data)
        return told if self.task is None else f"{told} {self.task.content_key()}"

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        if not self.data.holds("test"):
            node = self.data.node
            raise Refusal(
                f"{node}.holdout={self.data.holdout}: nothing falls to test; give {node}.test, or hold out more"
            )
        parents, exports = self._models(context), self._exports(context)
        for role, (stage, form) in exports.items():
            name = role.partition("/")[2]
            if stage not in context.planned and name not in _formats_of(context, stage):
                raise Refusal(
                    f"{context.stage}: {stage} has made no {name}; add {stage} to stages, or leave it out with "
                    f"{context.setting(stage, 'formats')}.{name}=null"
                )
            check_installed(f"{context.setting(stage, 'formats')}.{name}", instantiate(form, _convert_="all"))
        if not {**parents, **exports}:
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
        if self.task is not None:
            self.task.check()
            if not self.task.examples("test"):
                raise Refusal(
                    "task.test: there is no query to measure on; give task.test, or a task.holdout above 0 and more "
                    "queries"
                )
            for role, path in parents.items():
                self._check_room(role, context.config_folder(path), shown=role == self._teacher_role(context))
        return StagePlan(model=f"{len(parents) + len(exports)} models", data=corpus)

    def prepare(self, context: Context) -> None:
        """Nothing to share: one process does it all."""

    def run(self, context: Context) -> None:
        exports = self._exports(context)
        for stage in dict.fromkeys(stage for stage, _ in exports.values()):
            certified = artifact.read_manifest(context.run_dir / stage)
            if certified is None or artifact.content_hash(context.run_dir / stage) != certified["content_hash"]:
                raise Refusal(
                    f"{context.run_dir / stage}: its files have changed since they were certified; force=[{stage}] "
                    f"makes them anew"
                )
        alone = Alone(["models.measure"])
        rows: list[dict[str, Any]] = []
        right: dict[str, dict[str, dict[str, bool]]] = {}
        with tempfile.TemporaryDirectory(prefix="retort-before-") as start:
            folders = self._models(context)
            if self.before is not None and self.task is not None and self.teacher is not None:
                tokenizer = load_tokenizer(self.before.path or self.teacher.path, self._trusted)
                self.before.materialise(self.teacher.path, tokenizer, Path(start) / "start", self.seed)
                folders = {**folders, BEFORE: str(Path(start) / "start")}
            for role, folder in folders.items():
                measured = self._measured(context, role, folder, alone)
                right[role] = measured.pop("right", {})
                manifest = artifact.read_manifest(Path(folder)) or {}
                if (bits := (manifest.get("metrics") or {}).get("bits_per_weight")) is not None:
                    measured["bits_per_weight"] = bits  # as a container will hold it
                    measured.pop("zeros", None)  # quantized weights have zeros, and are not sparse for it
                path = None if role == BEFORE else str(Path(folder).resolve()) if Path(folder).exists() else folder
                rows.append(
                    {
                        "stage": role,
                        "path": path,
                        "parameters": measured.pop("parameters"),
                        "bytes": bytes_on_disk(folder),
                        **measured,
                        "seconds": manifest.get("seconds"),
                        "tokens": manifest.get("tokens"),
                    }
                )
                print(f"{role}: perplexity {measured['perplexity']:.2f}", flush=True)
        rows += [self._export_row(context, role, *found, alone) for role, found in exports.items()]
        if self.task is not None:
            rows = with_accuracy(rows, right, self._teacher_role(context), self.task)
        artifact.publish(
            context.out,
            lambda folder: None,
            {
                **context.manifest(self.makes),
                "metrics": {"rows": rows, "comparisons": self._comparisons(rows)},
                "certificates": {},
            },
        )

    def _export_row(
        self, context: Context, role: str, stage: str, node: dict[str, Any], alone: Alone
    ) -> dict[str, Any]:
        folder, name = context.run_dir / role, role.partition("/")[2]
        tokenizer = load_tokenizer(str(folder), self._trusted)
        batches, text_bytes, prompt = self._text(context, tokenizer)
        form = instantiate(node, _convert_="all")
        words = (form, str(folder), batches, text_bytes, prompt, context.device, self.speed)
        measured = alone(measure_export, *words, killed=_KILLED.format(role))
        metrics = _formats_of(context, stage).get(name, {})
        print(f"{role}: perplexity {measured['perplexity']:.2f}", flush=True)
        return {
            "stage": role,
            "path": str(folder.resolve()),
            "parameters": metrics.get("parameters"),
            "bytes": bytes_on_disk(str(folder)),
            "bits_per_weight": metrics.get("bits_per_weight"),
            **measured,
        }

    def _text(self, context: Context, tokenizer: Any) -> tuple[list[dict[str, Any]], int, Any]:
        """(batches of the test split, bytes of their text, a prompt)."""
        packed, statistics, _ = sequences_of(self.data, "test", tokenizer, context.data_folder)
        if not len(packed):
            raise Refusal("data.test: no text to measure on; give data.test or a data.holdout above 0")
        batches = [
            collate(
                [packed[i] for i in range(at, min(at + self.batch_size, len(packed)))],
                pad_token=pad_token(tokenizer),
            )
            for at in range(0, len(packed), self.batch_size)
        ]
        return batches, statistics["bytes"], batches[0]["input_ids"][:1, : self.speed.prompt_tokens]

    def _measured(self, context: Context, role: str, folder: str, alone: Alone) -> dict[str, Any]:
        tokenizer = load_tokenizer(folder, self._trusted)
        batches, text_bytes, prompt = self._text(context, tokenizer)
        quiz, left_out = self._quiz(tokenizer, shown=role == self._teacher_role(context))
        if told := ", ".join(
            f"{name.replace('_', ' ')} {n:,}" for name, n in left_out.items() if n and name in LEFT_OUT
        ):
            print(f"{role}: of the task's queries: {told}", flush=True)
        record = artifact.quantized_file(Path(folder))
        settings = (context.device, self.dtype, self.speed, self.data.packing, self._trusted)
        words = (folder, batches, text_bytes, prompt, *settings, quiz, record)
        measured: dict[str, Any] = alone(measure_folder, *words, killed=_KILLED.format(role))
        return measured

    def _teacher_role(self, context: Context) -> str | None:
        path = self.teacher.path if self.teacher is not None else None
        return next((role for role, folder in self._models(context).items() if folder == path), None)

    def _check_room(self, role: str, folder: str, shown: bool) -> None:
        """Whether the task's prompts and answers fit what a model reads; one that is not planned is not known yet."""
        assert self.task is not None
        if not (Path(folder) / "config.json").is_file():
            return
        limit = getattr(load_config(folder, role, self._trusted), "max_position_embeddings", None)
        for name in ("max_length", *(("teacher_max_length",) if shown and self.task.teacher_prompts else ())):
            if limit is not None and getattr(self.task, name) > limit:
                raise Refusal(
                    f"task.{name}={getattr(self.task, name)}: {role} reads at most {limit} tokens "
                    f"(max_position_embeddings)"
                )

    def _quiz(self, tokenizer: Any, shown: bool) -> tuple[Quiz | None, dict[str, int]]:
        """The task's queries, and what was left out of them; `shown`: also behind the teacher's demonstrations."""
        if self.task is None:
            return None, {}
        questions: dict[str, list[Question]] = {}
        counts: Counter[str] = Counter()
        for split, plain, behind in (("test", UNSEEN, SHOWN), ("train", SEEN, SHOWN_SEEN)):
            both = self.task.questions(split, tokenizer, self.task_queries, counts)
            questions[plain] = [one for one, _ in both]
            if shown:
                questions[behind] = [other for _, other in both]
        if not questions[UNSEEN]:
            raise Refusal(f"task.test: none of its queries fits ({dict(counts)}); raise task.max_length")
        end, rows = self.task.separator, 4 * self.batch_size
        return Quiz(questions, tokenizer, pad_token(tokenizer), end, rows, self.choices_per), dict(counts)

    def _comparisons(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        by_stage = {row["stage"]: row["perplexity"] for row in rows if "perplexity" in row}
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


def _formats_of(context: Context, stage: str) -> dict[str, dict[str, Any]]:
    """Format → its metrics, of what a stage `export` has made."""
    manifest = artifact.read_manifest(context.run_dir / stage)
    return manifest["metrics"]["formats"] if manifest else {}


def bytes_on_disk(folder: str) -> int | None:
    """Of the model itself: weights, config, tokenizer; not of what was logged beside it."""
    path = Path(folder)
    if not path.is_dir():
        return None
    beside = (
        artifact.MANIFEST,
        artifact.CARD,
        artifact.QUANTIZED,
        *artifact.BESIDE,
    )  # and folders: adapters that are merged already
    return sum(p.stat().st_size for p in path.glob("*") if p.is_file() and p.name not in beside)
