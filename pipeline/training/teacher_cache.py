"""Whether the cached logits that a stage is given serve its training: of this teacher, this text, this objective."""

from __future__ import annotations

from pathlib import Path

from models.errors import Refusal
from models.teachers.cache import HEADER, Cache, read_header
from models.teachers.teacher import SERVED, Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.sequences import Sequences
from pipeline.data.tokenizer import load_tokenizer, tokenizer_key
from pipeline.planned import needs_stage
from pipeline.training.prepare import Prepared
from pipeline.training.recipe import Recipe


def check_cache(context: Context, recipe: Recipe, teacher: Source) -> None:
    """In the check: the cache's header, as it is or as the stage before will write it, against what is asked of it."""
    path = teacher.recorded
    if path is None:
        return
    if recipe.align:
        raise Refusal(
            f"stages.{context.stage}.align=true: cached logits are of the student's own tokens; use "
            f"teacher=online or teacher=sharded"
        )
    folder = Path(context.config_folder(path))
    if not (folder / HEADER).exists() and (maker := context.produced_by(path)):
        raise needs_stage(context, maker, "teacher.cache")
    header = read_header(folder)
    if (folder / artifact.MANIFEST).exists() and artifact.read_manifest(folder) is None:
        raise Refusal(
            f"teacher.cache={path}: files that its {artifact.MANIFEST} lists are missing or cut short; "
            f"run the stage record again, which keeps what is whole"
        )
    if header.dtype != teacher.dtype:
        raise Refusal(
            f"teacher.dtype={teacher.dtype}: {path} was recorded in {header.dtype}; set teacher.dtype={header.dtype}"
        )
    encoding = header.open()
    for _, term in recipe.objective.terms:
        if term.needs_teacher and (reason := encoding.refusal(term)):
            raise Refusal(f"teacher.cache={path}: {reason}")
    if context.finished(teacher.path) or not context.produced_by(teacher.path):
        tokenizer = load_tokenizer(teacher.path, teacher.trust_remote_code)
        if header.tokenizer and header.tokenizer != tokenizer_key(tokenizer):
            raise Refusal(
                f"teacher.cache={path}: it was recorded with another tokenizer than {teacher.path}'s; "
                f"run the stage record on this teacher, or give the teacher it was recorded of"
            )


def check_prepared(context: Context, teacher: Source, path: str) -> None:
    """Before the ranks start: whether the cache is of this very teacher, and holds every prepared sequence. What is
    missing would be missed at its batch, perhaps days from now."""
    recorded = read_header(Path(path)).teacher
    by_name = teacher.path == path or recorded.startswith(SERVED)  # of a served one, a name is all there is
    if not by_name and recorded != context.parents["teacher"]["content_hash"]:
        raise Refusal(
            f"teacher.cache={path}: it was recorded of another teacher than {teacher.path}; run the "
            f"stage record on this teacher, or give teacher.path={path} to go by the cache alone"
        )
    sequences = Sequences(Prepared.read(context.work).train)
    Cache(Path(path)).check_holds(sequences.teacher_side())
