"""Train a student against a teacher, or, with an objective that needs none, its control."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from datasets import load_from_disk

from models.errors import Refusal
from models.load import check_folder, empty_model, parameter_count
from models.lora import Lora
from models.objectives.term import Objective, needs_teacher
from models.quantization import cache
from models.quantization.aware import Aware
from models.student import Start
from models.teachers.cache import HEADER, Cache, read_header
from models.teachers.teacher import Source
from models.training.on_policy import OnPolicy
from pipeline import artifact
from pipeline.calibration import known_of
from pipeline.context import Context
from pipeline.data import conversations
from pipeline.data.pairs import teacher_side
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.token_bytes import vocabulary_pairs
from pipeline.data.tokenizer import first_difference, load_tokenizer, tokenizer_key
from pipeline.planned import teacher_config
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training import fit


@dataclass(frozen=True)
class Distill(Stage):
    makes: ClassVar[Makes] = "model"

    data: DataSource
    teacher: Source
    student: Start
    objective: Objective
    training: fit.Training
    precision: str
    seed: int
    align: bool = False  # teacher and student may have different tokenizers: compared where they cover the same bytes
    on_policy: OnPolicy | None = None  # some of the steps on what the student writes itself
    lora: Lora | None = None  # adapters are trained and merged, and not the student's own weights
    keep_zeros: bool = False  # weights of the start that are zero stay zero
    qat: Aware | None = None  # the start's weights are on a grid (stage quantize), and stay on it

    @property
    def _taught(self) -> bool:
        return needs_teacher(self.objective)

    @property
    def _cache(self) -> str | None:
        return getattr(self.teacher, "cache", None) if self._taught and self.teacher.needs_record else None

    def ranks(self, context: Context) -> int:
        return context.world

    def parents(self, context: Context) -> dict[str, str]:
        # A control starts from the teacher's shape and tokenizer too, so the teacher is its parent as well.
        more = {"student": self.student.path, "signal": self._cache, **self.data.made_by_stages}
        return {"teacher": self.teacher.path, **{role: path for role, path in more.items() if path}}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        fit.check(context, self.training, self.precision)
        corpus = check_source(context, self.data)
        warnings = []
        # Where another program runs the teacher, or only its cache is left, its tokenizer and config will do.
        opened = self.student.opens_teacher or (self._taught and not self._cache)
        teacher = teacher_config(context, self.teacher, weights=opened)
        start = self._start(context)
        student = start.config(context.config_folder(self.teacher.path))
        fit.check_length(teacher, self.data, "teacher")
        fit.check_length(student, self.data, "student")
        sizes = {role: parameter_count(empty_model(c)) for role, c in (("teacher", teacher), ("student", student))}
        if self.align and not self.student.path:
            raise Refusal(
                f"stages.{context.stage}.align=true: the student has no tokenizer of its own; use student=folder"
            )
        if self._taught and self.data.teacher_prompts:
            self._check_contexts(context)
        if self.align and self.objective.representations:
            raise Refusal(
                f"objective.also: {self.objective.representations[0].name} compares layers position by position, and "
                f"stages.{context.stage}.align=true has other positions on either side; leave one of them out"
            )
        if self._taught:
            self.teacher.check(self.objective)
            for term in self.objective.representations:
                term.check(student, teacher)
        self._check_cache(context)
        if (packed := getattr(self.teacher, "weights", None)) and context.strategy.shards_parameters:
            raise Refusal(
                f"teacher.weights={packed} under ZeRO-3: packed weights are not sharded; use "
                f"strategy=zero2, or teacher.weights=null"
            )
        if self.lora is not None:
            self._check_lora(context, student)
        if self.qat is not None:
            self._check_qat(context, student)
        if self.on_policy is not None:
            self._check_on_policy(context, self.on_policy, {"teacher": teacher, "student": student})
        student.dtype = fit.SAVED[self.precision]
        context.plan_model(student)
        if self.qat is not None:
            folder = Path(context.config_folder(str(self.student.path)))
            context.plan_grid(self.qat.known(empty_model(student), known_of(folder)).said())
        fit.check_disk(context, sizes["student"])
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
            check_folder(path, "student")
            return self.student
        if context.config_folder(path) == path:
            raise Refusal(
                f"{context.stage} needs the stage {Path(path).name}, which has not been run; add it to stages, or give "
                f"another student.path"
            )
        return replace(self.student, path=context.config_folder(path))  # type: ignore[type-var]

    def _check_lora(self, context: Context, student: Any) -> None:
        assert self.lora is not None
        if self.on_policy is not None:
            raise Refusal(
                f"stages.{context.stage}.lora with on_policy: the adapted student does not write; leave one of them out"
            )
        if self.lora.base is not None and context.strategy.shards_parameters:
            raise Refusal(
                f"stages.{context.stage}.lora.base={self.lora.base} under ZeRO-3: packed weights are not sharded; use "
                f"strategy=zero2, or lora.base=null"
            )
        if self.keep_zeros and self.lora.base is not None:
            raise Refusal(
                f"stages.{context.stage}.lora.base={self.lora.base} with keep_zeros=true: in so few bits no weight is "
                f"known to be zero; set lora.base=null"
            )
        if self.keep_zeros and self.lora.dropout:
            raise Refusal(
                f"stages.{context.stage}.lora.dropout={self.lora.dropout} with keep_zeros=true: adapters are masked as "
                f"matrices, and dropout is of what they read; set lora.dropout=0"
            )
        self.lora.config(empty_model(student))  # targets that are not there are told now

    def _check_qat(self, context: Context, student: Any) -> None:
        assert self.qat is not None
        if self.qat.cache is not None:
            cache.check(student, self.qat.cache, f"stages.{context.stage}.qat.cache")
        path = self.student.path
        if not path:
            raise Refusal(
                f"stages.{context.stage}.qat: training starts from what the stage quantize has made; use "
                f"student@stages.{context.stage}.student=folder with its path"
            )
        if self.lora is not None and (self.lora.base is not None or self.lora.dropout or self.keep_zeros):
            what = "keep_zeros=true" if self.keep_zeros else "lora.dropout" if self.lora.dropout else "lora.base"
            raise Refusal(
                f"stages.{context.stage}: {what} with qat and lora: what is trained is fq(W + BA), a whole matrix in "
                f"full precision; set lora.base=null, lora.dropout=0, keep_zeros=false"
            )

    def _check_tokenizers(self, context: Context, teacher: Any, student: Any, chat: bool) -> None:
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        if chat:
            conversations.chat_template(tokenizer, self.data)
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

    def _check_contexts(self, context: Context) -> None:
        """What a teacher that reads other prompts than the student cannot do."""
        if self.align:
            raise Refusal(
                f"stages.{context.stage}.align=true: a teacher with prompts of its own is compared token by token; use "
                f"a student of the teacher's tokenizer"
            )
        if self.objective.representations:
            raise Refusal(
                f"objective.also: {self.objective.representations[0].name} compares layers position by position, and "
                f"the teacher's prompts are other ones; leave it out"
            )
        if self._cache and self.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={self.data.teacher_prompts}: the mean of several prompts' distributions is not recorded; "
                f"use task.draws=1, or teacher=online or sharded"
            )

    def _check_on_policy(self, context: Context, on_policy: OnPolicy, configs: dict[str, Any]) -> None:
        """What cannot be done with text that is not there yet."""
        on_policy.check(self.objective, self.teacher, self.training.global_batch)
        if self.align:
            raise Refusal(
                f"stages.{context.stage}.align=true with on_policy: what the student writes has no spans; use a "
                f"student of the teacher's tokenizer, or leave on_policy out"
            )
        if self.data.packing:
            raise Refusal(
                f"data.packing=true with stages.{context.stage}.on_policy: an answer needs a row of its own; set "
                f"packing=false on what the stage reads"
            )
        if self.training.max_tokens is not None:
            raise Refusal(
                f"stages.{context.stage}.training.max_tokens={self.training.max_tokens} with on_policy: how long the "
                f"student's answers are is not known before; use max_steps or epochs"
            )
        new = on_policy.sampling.max_new_tokens
        for role, config in configs.items():
            name = "teacher_max_length" if role == "teacher" and self.data.teacher_prompts else "max_length"
            longest = getattr(self.data, name) + new
            if (limit := getattr(config, "max_position_embeddings", None)) and limit < longest:
                raise Refusal(
                    f"on_policy.sampling.max_new_tokens={new} behind a prompt of up to {name}={longest - new}: the "
                    f"{role} reads at most {limit} tokens (max_position_embeddings); lower one of the two"
                )

    def _check_cache(self, context: Context) -> None:
        """The cache's header, as it is or as the stage before will write it, against what is asked of it."""
        if self._cache is None:
            return
        if self.align:
            raise Refusal(
                f"stages.{context.stage}.align=true: a recorded signal is of the student's own tokens; use "
                f"teacher=online or teacher=sharded"
            )
        folder = Path(context.config_folder(self._cache))
        if not (folder / HEADER).exists() and (maker := context.produced_by(self._cache)):
            raise Refusal(
                f"{context.stage} needs the stage {maker}, which has not been run; add it to stages, or give "
                f"teacher.cache=FOLDER"
            )
        header = read_header(folder)
        if (folder / artifact.MANIFEST).exists() and artifact.read_manifest(folder) is None:
            raise Refusal(
                f"teacher.cache={self._cache}: files that its {artifact.MANIFEST} lists are missing or cut short; "
                f"run the stage record again, which keeps what is whole"
            )
        if header.dtype != self.teacher.dtype:
            raise Refusal(
                f"teacher.dtype={self.teacher.dtype}: {self._cache} was recorded in {header.dtype}; set "
                f"teacher.dtype={header.dtype}"
            )
        encoding = header.open()
        for _, term in self.objective.terms:
            if term.needs_teacher and (reason := encoding.refusal(term)):
                raise Refusal(f"teacher.cache={self._cache}: {reason}")
        made_here = context.produced_by(self.teacher.path)
        if context.finished(self.teacher.path) or not made_here:
            tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
            if header.tokenizer and header.tokenizer != tokenizer_key(tokenizer):
                raise Refusal(
                    f"teacher.cache={self._cache}: it was recorded with another tokenizer than {self.teacher.path}'s; "
                    f"run the stage record on this teacher, or give the teacher it was recorded of"
                )

    def prepare(self, context: Context) -> None:
        tokenizer, students = self._tokenizers()
        fit.prepare(
            context,
            self.data,
            students or tokenizer,
            lambda folder: self._write_start(students or tokenizer, folder),
            teacher_tokenizer=tokenizer if students and self.align else None,
        )
        if self._cache:
            self._check_recorded(context)
            # What is missing would be missed at its batch, perhaps days from now.
            rows = json.loads((context.work / "prepared.json").read_text())["train"]
            Cache(Path(self._cache)).check_holds(teacher_side(load_from_disk(rows)))

    def _write_start(self, tokenizer: Any, folder: Path) -> None:
        self.student.materialise(self.teacher.path, tokenizer, folder, self.seed)
        if self.qat is not None and self.qat.needs_record:
            shutil.copy(Path(str(self.student.path)) / artifact.GRID, folder)

    def _check_recorded(self, context: Context) -> None:
        """Whether the cache is of this very teacher; of one that is served, the model's name is all there is."""
        assert self._cache is not None
        recorded = read_header(Path(self._cache)).teacher
        if self.teacher.path == self._cache or recorded.startswith("served "):
            return
        if recorded != context.parents["teacher"]["content_hash"]:
            raise Refusal(
                f"teacher.cache={self._cache}: it was recorded of another teacher than {self.teacher.path}; run the "
                f"stage record on this teacher, or give teacher.path={self._cache} to go by the record alone"
            )

    def _tokenizers(self) -> tuple[Any, Any]:
        """The teacher's, and the student's where it is another one, which then reads the text."""
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        if not self.student.path or (self._taught and not self.align):
            return tokenizer, None
        other = load_tokenizer(self.student.path)
        return tokenizer, other if self.align or first_difference(tokenizer, other) else None

    def run(self, context: Context) -> None:
        teachers, students = self._tokenizers()
        fit.train(
            context,
            objective=self.objective,
            teacher=self.teacher if self._taught else None,
            data=self.data,
            training=self.training,
            precision=self.precision,
            teacher_tokenizer=teachers if students and self._taught else None,
            on_policy=self.on_policy,
            lora=self.lora,
            keep_zeros=self.keep_zeros,
            qat=self.qat,
        )
