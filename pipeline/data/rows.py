"""Prepared rows by name: built once, shared by the stages of a run; and the contract of what they are made from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from models.errors import Refusal
from pipeline.context import Context
from pipeline.data import packing
from pipeline.data.tokenizer import load_tokenizer


@runtime_checkable
class RowSource(Protocol):
    """conf/data and conf/task: where rows come from."""

    node: ClassVar[str]  # of the configuration, as messages call it
    max_length: int  # tokens in a row
    packing: bool
    chat_template: str | None  # a file, in place of the tokenizer's
    validation_rows: int | None
    holdout: float  # share of train held out for each split that is not given
    test: Any  # a source, or None

    @property
    def stops(self) -> list[str]:
        """Texts that end what is supervised, where that is not the tokenizer's end token."""
        ...

    @property
    def teacher_prompts(self) -> int:
        """How many prompts of its own a teacher reads for each row; 0 where it reads the student's."""
        ...

    @property
    def made_by_stages(self) -> dict[str, str]:
        """Role → folder, of what a stage of this run may still have to make; it is then a parent of who reads it."""
        ...

    def check(self, planned: bool = False) -> dict[str, Any]:
        """Refuse what can be refused without reading all of it; {"chat": bool, …} for the plan. `planned`: the
        folders of `made_by_stages` are not there yet."""
        ...

    def holds(self, split: str) -> bool:
        """False where it can be seen now that a split will have no row."""
        ...

    def content_key(self) -> str:
        """A hash of what the sources hold and how it becomes rows."""
        ...

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """The rows of a split, written to `folder` once, and their statistics."""
        ...


def check_source(context: Context, data: RowSource) -> dict[str, Any]:
    """`data.check`, where what a stage of this run makes may still be to come."""
    planned = False
    for path in data.made_by_stages.values():
        maker = context.produced_by(path)
        if maker and not context.finished(path):
            planned = True
            if maker not in context.planned:
                raise Refusal(
                    f"{context.stage} needs the stage {maker}, which has not been run; add it to stages, or give "
                    f"data.train=FOLDER"
                )
    return data.check(planned)


def source_key(data: RowSource) -> str:
    """What a stage states as the hash of its text; "" where the folder it is read from is a parent anyway."""
    return "" if data.made_by_stages else data.content_key()


def tokenizer_of(path: str, data: RowSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder or hub id, with the template of `data` where it names one: every stage that reads
    the same text with the same tokenizer then finds the same prepared rows."""
    return with_template(load_tokenizer(path, trust_remote_code), data)


def with_template(tokenizer: Any, data: RowSource) -> Any:
    """`tokenizer`, changed in place to the template of `data` where it names one."""
    if data.chat_template is not None:
        tokenizer.chat_template = packing.chat_template(tokenizer, data)
    return tokenizer


def rows_of(
    data: RowSource, split: str, tokenizer: Any, root: Path, teacher_tokenizer: Any | None = None
) -> tuple[Any, dict[str, Any], Path]:
    """(rows, statistics, folder) of a split; the folder's name says everything the rows depend on.

    With `teacher_tokenizer` they carry the teacher's tokens and the spans between both (pipeline/data/packing.py).
    """
    told = [data.content_key(), *_told(tokenizer)]
    if teacher_tokenizer is not None:
        told += _told(teacher_tokenizer)
        # The ends are no part of the rules, and which tokens are special decides what is aligned.
        told += [[t.bos_token_id, t.eos_token_id, t.all_special_ids] for t in (tokenizer, teacher_tokenizer)]
    folder = root / f"{split}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"
    if folder.exists():
        return (*packing.prepared(folder), folder)
    return (*data.prepare(split, tokenizer, folder, teacher_tokenizer), folder)


def _told(tokenizer: Any) -> list[Any]:
    told = [sorted(tokenizer.get_vocab().items()), getattr(tokenizer, "chat_template", None)]
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        told.append(
            {name: rule for name, rule in rules.items() if name not in ("truncation", "padding")}
        )  # last call's
    return told
