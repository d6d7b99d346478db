"""Train a student against a teacher, or, with an objective that needs none, its control."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from hydra.utils import instantiate

from models.errors import Problems, Refusal
from models.load import check_model, empty_model, parameter_count
from models.lora import Lora
from models.objectives.term import Objective, needs_teacher
from models.quantization.aware import Aware
from models.student import Start
from models.teachers.teacher import Source
from models.training.on_policy import OnPolicy
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.rendering import template_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.token_bytes import vocabulary_pairs
from pipeline.data.tokenizer import first_difference, load_tokenizer
from pipeline.forecast.workload import Trains
from pipeline.planned import architecture_of, needs_stage, outline_of, teacher_config, text_bytes
from pipeline.stages.stage import Makes, Reading, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training import settings
from pipeline.training.combinations import Combination
from pipeline.training.prepare import prepare
from pipeline.training.recipe import Recipe
from pipeline.training.teacher_cache import check_prepared
from pipeline.training.train import train


@dataclass(frozen=True)
class Distill(Stage):
    """Trains `student` on `data` by `objective`, against `teacher` where the objective asks one.

    Four stages are yamls of this class, which differ in what they start from and what they train: `distill` (any
    start), `control` (the same start without the teacher), `recover` (a pruned or sparse model, against the model that
    it was made of), `qat` (a quantized model that stays quantized, against its float parent).
    """

    makes: ClassVar[Makes] = "model"

    data: DataSource
    teacher: Source
    student: Start
    objective: Objective
    training: settings.Training
    precision: str
    seed: int
    align: bool = False  # teacher and student may have different tokenizers: compared where they cover the same bytes
    on_policy: OnPolicy | None = None  # some of the steps are on text that the student writes
    lora: Lora | None = None  # adapters are trained and merged, and not the student's own weights
    keep_zeros: bool = False  # weights of the start that are zero stay zero
    qat: Aware | None = None  # the start's weights are quantized (stage quantize), and stay so

    @classmethod
    def multiple(cls, settings: Mapping[str, Any]) -> int:
        qat = instantiate(settings["qat"], _convert_="all") if settings.get("qat") is not None else None
        return qat.multiple if isinstance(qat, Aware) else 1  # its check refuses others

    def ranks(self, context: Context) -> int:
        return context.world

    def parents(self, context: Context) -> dict[str, str]:
        # A control starts from the teacher's shape and tokenizer too, so the teacher is its parent as well.
        more = {"student": self.student.path, "signal": self._cache, **self.data.made_by_stages}
        return {"teacher": self.teacher.path, **{role: path for role, path in more.items() if path}}

    def content(self) -> str:
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        problems, warnings = Problems(), list[str]()
        with problems:
            warnings += settings.check(context, self.training, self.precision)
        corpus = check_source(context, self.data)
        # Where another program runs the teacher, or only its cache is left, its tokenizer and config will do.
        beside = self._taught and not self._cache
        opened = self.student.opens_teacher or beside
        teacher = teacher_config(context, self.teacher, weights=opened, runs=beside)
        start, known = self._start(context), context.config_folder(self.teacher.path)
        student = start.config(known)
        warnings += [f"the student's {note}" for note in start.notes(known)]
        runs = {"student": student} | ({"teacher": teacher} if beside else {})
        with problems:
            settings.check_length(teacher, self.data, "teacher")
            settings.check_length(student, self.data, "student")
        for role, config in runs.items():
            with problems:
                settings.check_family(context, config)
                settings.check_packing(config, self.data, role)
        sizes = {role: parameter_count(empty_model(c)) for role, c in (("teacher", teacher), ("student", student))}
        with problems:
            Combination(context, self._recipe, self.teacher, self.student, teacher, student).check()
        with problems:
            self._plan(context, student)
            trained = self.lora.parameters(empty_model(student)) if self.lora else None
            vocabulary = student.get_text_config().vocab_size
            settings.check_disk(
                context, sizes["student"], corpus, vocabulary, trained, teacher=self.teacher if beside else None
            )
        problems.tell()
        if sizes["student"] > sizes["teacher"]:
            warnings.append(
                f"the student ({sizes['student']:,} parameters) is larger than its teacher ({sizes['teacher']:,})"
            )
        if context.finished(self.teacher.path) or not context.produced_by(self.teacher.path):
            self._check_tokenizers(context, teacher, student, chat=bool(corpus["chat"]))
        return StagePlan(
            model=student.model_type,
            parameters=sizes["student"],
            data=corpus,
            until=self.training.length(),
            warnings=warnings,
            commits={"teacher": getattr(teacher, "_commit_hash", None)},
            teacher=f"{self.teacher.path} ({sizes['teacher']:,})" if self._taught else "",
        )

    def reading(self, context: Context, scratch: Path) -> Reading:
        for path in (self.teacher.path, self.student.path):
            if path and context.produced_by(path) and not context.finished(path):
                raise Refusal(
                    f"show_data: {context.stage} reads text with the tokenizer of {path}, which is still to be made; "
                    f"run that stage first"
                )
        tokenizer, students = self._tokenizers()
        return self.data, students or tokenizer, tokenizer if students and self.align else None

    def workload(self, context: Context) -> Trains:
        given, trusted = self.teacher.path, self.teacher.trust_remote_code
        teacher = architecture_of(context, given, "teacher", setting="teacher.path", trust_remote_code=trusted)
        start = self.student
        if start.path:
            setting = f"{context.setting(context.stage, 'student')}.path"
            architecture_of(context, start.path, "student", setting=setting)
            start = replace(start, path=context.config_folder(start.path))  # type: ignore[type-var]
        student = start.config(context.config_folder(given))
        self._plan(context, student)
        return Trains(
            recipe=self._recipe,
            student=student,
            teacher=teacher,
            fresh=not start.path,
            start=start.path,
            made_here=context.produced_by(given) is not None,
            text_bytes=text_bytes(context, self.data),
        )

    def prepare(self, context: Context) -> None:
        tokenizer, students = self._tokenizers()
        prepare(
            context,
            self.data,
            students or tokenizer,
            lambda folder: self._write_start(students or tokenizer, folder),
            teacher_tokenizer=tokenizer if students and self.align else None,
        )
        if self._cache:
            check_prepared(context, self.teacher, self._cache)

    def run(self, context: Context) -> None:
        train(context, self._recipe)

    @property
    def _taught(self) -> bool:
        return needs_teacher(self.objective)

    @property
    def _cache(self) -> str | None:
        return self.teacher.recorded if self._taught else None

    @property
    def _recipe(self) -> Recipe:
        return Recipe(
            objective=self.objective,
            teacher=self.teacher if self._taught else None,
            data=self.data,
            training=self.training,
            precision=self.precision,
            align=self.align,
            on_policy=self.on_policy,
            lora=self.lora,
            keep_zeros=self.keep_zeros,
            qat=self.qat,
        )

    def _to_be_made(self, context: Context) -> bool:
        """Whether the folder that the student starts from is still another stage's work."""
        path = self.student.path
        return bool(path and context.produced_by(path) and not context.finished(path))

    def _start(self, context: Context) -> Start:
        """In the check: the student's, with the plan of its folder where that is to be made."""
        path = self.student.path
        if not path:
            return self.student
        if not self._to_be_made(context):
            check_model(path, "student")
            return self.student
        if context.config_folder(path) == path:
            raise needs_stage(context, Path(path).name, f"{context.setting(context.stage, 'student')}.path")
        return replace(self.student, path=context.config_folder(path))  # type: ignore[type-var]

    def _plan(self, context: Context, student: Any) -> None:
        """In the check: what this stage will make, for the stages after it."""
        student.dtype = self._recipe.saved
        context.plan_model(student)
        if self.qat is not None and self.student.path:  # without one, refused by Combination
            folder = Path(context.config_folder(str(self.student.path)))
            context.plan_quantized(self.qat.outline(empty_model(student), outline_of(folder)).as_json())

    def _check_tokenizers(self, context: Context, teacher: Any, student: Any, chat: bool) -> None:
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        if chat:
            template_of(tokenizer, self.data)
        if self.student.path and not self._to_be_made(context):
            other = load_tokenizer(self.student.path)
            # Without a teacher beside it a student reads text in its own tokens: sequence-level, from a teacher's text.
            if self._taught and not self.align and (difference := first_difference(tokenizer, other)):
                raise Refusal(
                    f"teacher and student have different tokenizers: {difference}; set stages.{context.stage}.align="
                    f"true to compare them where they cover the same bytes, or learn the teacher's text alone (stage "
                    f"generate, data=answers, data.as_text=true, objective=cross_entropy)"
                )
            if self.align:
                vocabulary_pairs(other, tokenizer)
        else:
            other = tokenizer
        for role, config, its in (("teacher", teacher, tokenizer), ("student", student, other)):
            if config.vocab_size < len(its):
                raise Refusal(
                    f"{role}: vocab_size={config.vocab_size} is smaller than its tokenizer's {len(its)} tokens"
                )

    def _tokenizers(self) -> tuple[Any, Any]:
        """The teacher's, and the student's where it is another one, which then reads the text."""
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        if not self.student.path or (self._taught and not self.align):
            return tokenizer, None
        other = load_tokenizer(self.student.path)
        return tokenizer, other if self.align or first_difference(tokenizer, other) else None

    def _write_start(self, tokenizer: Any, folder: Path) -> None:
        self.student.materialise(self.teacher.path, tokenizer, folder, self.seed)
        if self.qat is not None and self.qat.needs_quantized:
            shutil.copy(Path(str(self.student.path)) / artifact.QUANTIZED, folder)
