"""Train a student against a teacher, or, with an objective that needs none, its control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.errors import Refusal
from models.load import check_folder, empty_model, load_config, parameter_count
from models.objectives.term import Objective
from models.student import Start
from models.teacher import Online
from pipeline import fit
from pipeline.context import Context
from pipeline.data import corpora, packing
from pipeline.data.tokenizer import first_difference, load_tokenizer


@dataclass(frozen=True)
class Distill:
    data: corpora.Data
    teacher: Online
    student: Start
    objective: Objective
    training: fit.Training
    precision: str
    seed: int

    @property
    def _taught(self) -> bool:
        return any(term.needs_teacher for _, term in self.objective.terms)

    def ranks(self, context: Context) -> int:
        return context.world

    def parents(self, context: Context) -> dict[str, str]:
        # A control starts from the teacher's shape and tokenizer too, so the teacher is its parent as well.
        return {"teacher": self.teacher.path, **({"student": self.student.path} if self.student.path else {})}

    def content(self) -> str:
        """Hash of the text it reads."""
        return corpora.content_key(self.data)

    def check(self, context: Context) -> dict[str, Any]:
        fit.check(context, self.training, self.precision)
        corpus = corpora.check(self.data)
        warnings = []
        made_here = context.produced_by(self.teacher.path)
        if not made_here:
            check_folder(self.teacher.path, "teacher")
        elif context.config_folder(self.teacher.path) == self.teacher.path and not context.finished(self.teacher.path):
            raise Refusal(
                f"{context.stage} needs the stage {made_here}, which has not been run; add it to stages, or "
                f"give teacher.path=FOLDER"
            )
        if self.student.path:
            check_folder(self.student.path, "student")
        teacher_folder = context.config_folder(self.teacher.path)
        teacher = load_config(teacher_folder, "teacher", self.teacher.trust_remote_code)
        student = self.student.config(teacher_folder)
        fit.check_length(teacher, self.data, "teacher")
        fit.check_length(student, self.data, "student")
        sizes = {role: parameter_count(empty_model(c)) for role, c in (("teacher", teacher), ("student", student))}
        context.plan_model(student)
        fit.check_disk(context, sizes["student"])
        if sizes["student"] > sizes["teacher"]:
            warnings.append(
                f"the student ({sizes['student']:,} parameters) is larger than its teacher ({sizes['teacher']:,})"
            )
        if context.finished(self.teacher.path) or not made_here:
            self._check_tokenizers(teacher, student, chat=bool(corpus["chat"]))
        return {
            "model": student.model_type,
            "parameters": sizes["student"],
            "data": corpus,
            "length": self.training.length(),
            "warnings": warnings,
            "commits": {"teacher": getattr(teacher, "_commit_hash", None)},
            "teacher": f"{self.teacher.path} ({sizes['teacher']:,})" if self._taught else None,
        }

    def _check_tokenizers(self, teacher: Any, student: Any, chat: bool) -> None:
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        if chat:
            packing.chat_template(tokenizer, self.data)
        if self.student.path:
            other = load_tokenizer(self.student.path)
            if difference := first_difference(tokenizer, other):
                raise Refusal(
                    f"teacher and student have different tokenizers: {difference}; logit distillation needs "
                    f"one vocabulary, so choose a student of the teacher's family or a student shape"
                )
        for role, config in (("teacher", teacher), ("student", student)):
            if config.vocab_size < len(tokenizer):
                raise Refusal(
                    f"{role}: vocab_size={config.vocab_size} is smaller than its tokenizer's {len(tokenizer)} tokens"
                )

    def prepare(self, context: Context) -> None:
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        fit.prepare(
            context,
            self.data,
            tokenizer,
            lambda folder: self.student.materialise(self.teacher.path, tokenizer, folder, self.seed),
        )

    def run(self, context: Context) -> None:
        fit.train(
            context,
            objective=self.objective,
            load_teacher=self.teacher.load if self._taught else None,
            data=self.data,
            training=self.training,
            precision=self.precision,
        )
