"""Choices of a stage that trains which do not go together, as its check sees them before a weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from models.errors import Refusal
from models.load import empty_model
from models.objectives.term import needs_teacher
from models.quantization import cache
from models.student import Start
from models.teachers.teacher import Source
from pipeline.context import Context
from pipeline.training.recipe import Recipe
from pipeline.training.teacher_cache import check_cache


@dataclass(frozen=True)
class Combination:
    """One stage's choices, and the Hugging Face configs of the two models that they are about."""

    context: Context
    recipe: Recipe
    source: Source  # of the teacher, whose tokenizer and shape count where the objective asks none, too
    start: Start
    teacher: Any
    student: Any

    def check(self) -> None:
        """Raises Refusal with the first pair that does not go together."""
        recipe = self.recipe
        if recipe.align:
            self._check_align()
        if recipe.data.teacher_prompts and needs_teacher(recipe.objective):
            self._check_contexts()
        if recipe.align and recipe.objective.representations:
            raise Refusal(
                f"objective.also: {recipe.objective.representations[0].name} compares layers position by position, and "
                f"{self._stage}.align=true has other positions on either side; leave one of them out"
            )
        self._check_teacher()
        if recipe.lora is not None:
            self._check_lora()
        if recipe.qat is not None:
            self._check_qat()
        if recipe.on_policy is not None:
            self._check_on_policy()

    @property
    def _stage(self) -> str:
        return f"stages.{self.context.stage}"

    def _check_align(self) -> None:
        if not self.start.path:
            raise Refusal(f"{self._stage}.align=true: the student has no tokenizer of its own; use student=folder")

    def _check_contexts(self) -> None:
        """A teacher that reads other prompts than the student."""
        recipe = self.recipe
        if recipe.align:
            raise Refusal(
                f"{self._stage}.align=true: a teacher with prompts of its own is compared token by token; use "
                f"a student of the teacher's tokenizer"
            )
        if recipe.objective.representations:
            raise Refusal(
                f"objective.also: {recipe.objective.representations[0].name} compares layers position by position, and "
                f"the teacher's prompts are other ones; leave it out"
            )
        if self.source.needs_record and recipe.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={recipe.data.teacher_prompts}: the mean of several prompts' distributions is not cached; "
                f"use task.draws=1, or teacher=online or sharded"
            )

    def _check_teacher(self) -> None:
        recipe = self.recipe
        if needs_teacher(recipe.objective):
            self.source.check(recipe.objective)
            for term in recipe.objective.representations:
                term.check(self.student, self.teacher)
            check_cache(self.context, recipe, self.source)
        if (packed := self.source.packed_weights) and self.context.strategy.shards_parameters:
            raise Refusal(
                f"teacher.weights={packed} under ZeRO-3: packed weights are not sharded; use "
                f"strategy=zero2, or teacher.weights=null"
            )

    def _check_lora(self) -> None:
        lora, keep_zeros = self.recipe.lora, self.recipe.keep_zeros
        assert lora is not None
        if self.recipe.on_policy is not None:
            raise Refusal(
                f"{self._stage}: lora with on_policy: a student with adapters cannot write; set lora=null or "
                f"on_policy=null"
            )
        if lora.base is not None and self.context.strategy.shards_parameters:
            raise Refusal(
                f"lora.base={lora.base} under ZeRO-3: packed weights are not sharded; use strategy=zero2, or "
                f"lora.base=null"
            )
        if keep_zeros and lora.base is not None:
            raise Refusal(
                f"lora.base={lora.base} with {self._stage}.keep_zeros=true: in so few bits no weight is known to be "
                f"zero; set lora.base=null"
            )
        if keep_zeros and lora.dropout:
            raise Refusal(
                f"lora.dropout={lora.dropout} with {self._stage}.keep_zeros=true: an adapter is masked as a matrix, "
                f"and dropout applies to the adapter's inputs; set lora.dropout=0"
            )
        lora.config(empty_model(self.student))  # refuses targets that are not there

    def _check_qat(self) -> None:
        qat, lora, keep_zeros = self.recipe.qat, self.recipe.lora, self.recipe.keep_zeros
        assert qat is not None
        if qat.cache is not None:
            cache.check(self.student, qat.cache, "qat.cache")
        if not self.start.path:
            raise Refusal(
                f"{self._stage}.qat: training starts from what the stage quantize has made; use student=folder "
                f"and give its folder as {self._stage}.student.path"
            )
        if lora is not None and (lora.base is not None or lora.dropout or keep_zeros):
            what = "keep_zeros=true" if keep_zeros else "lora.dropout" if lora.dropout else "lora.base"
            raise Refusal(
                f"{self._stage}: {what} with qat and lora: what is trained is fq(W + BA), a whole matrix in "
                f"full precision; set {self._stage}.lora=null, or lora.base=null, lora.dropout=0 and keep_zeros=false"
            )

    def _check_on_policy(self) -> None:
        """What cannot be done with text that is not there yet."""
        on_policy, data, training = self.recipe.on_policy, self.recipe.data, self.recipe.training
        assert on_policy is not None
        on_policy.check(self.recipe.objective, self.source, training.global_batch)
        if self.recipe.align:
            raise Refusal(
                f"{self._stage}.align=true with on_policy: what the student writes has no spans; use a "
                f"student of the teacher's tokenizer, or set on_policy=null"
            )
        if data.packing:
            raise Refusal(
                f"data.packing=true with {self._stage}.on_policy: an answer needs a sequence of its own; set "
                f"packing=false on what the stage reads"
            )
        if training.max_tokens is not None:
            raise Refusal(
                f"{self._stage}.training.max_tokens={training.max_tokens} with on_policy: how long the student's "
                f"answers are is not known before; use max_steps or epochs"
            )
        new = on_policy.sampling.max_new_tokens
        for role, config in {"teacher": self.teacher, "student": self.student}.items():
            name = "teacher_max_length" if role == "teacher" and data.teacher_prompts else "max_length"
            longest = getattr(data, name) + new
            if (limit := getattr(config, "max_position_embeddings", None)) and limit < longest:
                raise Refusal(
                    f"on_policy.sampling.max_new_tokens={new} behind a prompt of up to {name}={longest - new}: the "
                    f"{role} reads at most {limit} tokens (max_position_embeddings); lower one of the two"
                )
