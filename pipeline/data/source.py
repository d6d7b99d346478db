"""What a data source is: all that stages and packing know of it.

A source of your own is a dataclass that derives from `DataSource`, in a file of its own, and a yaml in conf/data that
names it as `_target_` and sets its fields. Nothing else is edited. It reads its documents, and lets the rooms beside
this file do the rest:

    texts      train_tokenizer reads them (stage pretrain)
    prompts    pipeline.data.prompts makes them of documents (stage generate)
    prepare    pipeline.data.packing.prepare makes packed sequences of documents (every stage that reads tokens)

Documents are a `datasets.Dataset` with a column `text`, or `messages` of conversations; with `weight_column` set, also
with a column `weight`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import Refusal
from pipeline.context import Context

if TYPE_CHECKING:
    from pipeline.data.parts import Parts

SPLITS = ("train", "validation", "test")
PARSE = "parse"  # of control_tokens
DATE = "2024-07-26"  # the one that Llama 3's own templates take where they cannot ask for today's


@dataclass(frozen=True)
class Prompt:
    """What the stage `generate` asks a teacher to go on from."""

    text: str
    ids: list[int]  # the student's
    teacher_ids: list[int]  # mostly the same


class DataSource(ABC):
    """conf/data and conf/task: where packed sequences come from."""

    node: ClassVar[str] = "data"  # of the configuration, for messages
    # fields that name files, of which a rerun compares what they hold (content_key, made_by_stages) and not the path
    compared_by_content: ClassVar[frozenset[str]] = frozenset(SPLITS)

    max_length: int  # tokens in a packed sequence
    packing: bool  # several pieces in a sequence; else each is padded by itself
    validation_sequences: int | None  # measured at each validation while training; None: all
    holdout: float = 0.0  # share of train held out for each split that is not given; for messages
    weight_column: str | None = None  # set: documents have a column `weight`, what each counts in the loss
    control_tokens: str | None = None  # parse: what texts spell is read as control tokens; None: it is text
    date: str | None = None  # that chat templates are told for today's, YYYY-MM-DD; None: always the same
    workers: int | None = None  # processes that tokenize; None: one a core
    teacher_max_length: int = 0  # tokens of what a teacher reads, where `teacher_prompts` is above 0

    @property
    def chat_template(self) -> str | None:
        """A jinja file in place of the tokenizer's template, of sources that hold conversations."""
        return None

    @property
    def stops(self) -> list[str]:
        """Texts that end what is supervised, where that is not the tokenizer's end token."""
        return []

    @property
    def teacher_prompts(self) -> int:
        """How many prompts of its own a teacher reads for each sequence; 0 where it reads the student's."""
        return 0

    @property
    def whole_prompts(self) -> bool:
        """Whether its prompts are whole by themselves, so that `prompts` cannot shorten them to `prompt_tokens`."""
        return False

    @property
    def made_by_stages(self) -> dict[str, str]:
        """Role → folder, of what a stage of this run may still have to make; it is then a parent of who reads it."""
        return {}

    @abstractmethod
    def check(self, planned: bool = False) -> dict[str, Any]:
        """Refuse what can be refused without reading all of it, and describe the rest for the printed plan.

        {"chat": bool, "train": {"sources": [str], "bytes": int | None, "documents": int | None}}; train may also have
        "tokens_at_most". `chat`: it holds conversations. `planned`: the folders of `made_by_stages` are not there yet.
        """

    @abstractmethod
    def holds(self, split: str) -> bool:
        """False where it can be seen now that a split (train, validation or test) will have no sequence."""

    @abstractmethod
    def content_key(self) -> str:
        """A hash of what it holds and how that becomes sequences: for one tokenizer, equal keys mean equal sequences.

        A key of another meaning would let a stage read sequences that were prepared from another text.
        """

    def sample(self, documents: int) -> DataSource:
        """The source with only so many of the first documents of each split, to look at some of them soon."""
        return self

    @abstractmethod
    def texts(self, split: str) -> Iterable[str]:
        """What a tokenizer is trained on. Raises Refusal where there is none."""

    @abstractmethod
    def prompts(self, split: str, tokenizer: Any, prompt_tokens: int | None, tally: Counter[str]) -> Iterator[Prompt]:
        """What a teacher is asked; `prompt_tokens` as in pipeline/data/prompts.py. What is left out is counted."""

    def parts(self, split: str) -> Parts | None:
        """Text that is prepared part by part, for jobs that share it out; None where it is prepared in one go."""
        return None

    @abstractmethod
    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """The packed sequences of a split, written to `folder` once, and their statistics.

        With `teacher_tokenizer` they carry the teacher's tokens, and the spans between both (pipeline/data/packing.py).
        """


def check_source(context: Context, data: DataSource) -> dict[str, Any]:
    """`data.check`, where what a stage of this run makes may still be to come."""
    planned = False
    for path in data.made_by_stages.values():
        maker = context.produced_by(path)
        if maker and not context.finished(path):
            planned = True
            if maker not in context.planned:
                raise Refusal(
                    f"{context.stage} needs the stage {maker}, which has not been run; run it too, or give "
                    f"data.train=FOLDER"
                )
    return data.check(planned)


def source_key(data: DataSource) -> str:
    """What a stage states as the hash of its text; "" where the folder it is read from is a parent anyway."""
    return "" if data.made_by_stages else data.content_key()


def check_reading(data: DataSource) -> None:
    """Refuse settings of how texts are read that mean nothing."""
    if data.control_tokens not in (None, PARSE):
        raise Refusal(
            f"{data.node}.control_tokens={data.control_tokens}: need {PARSE}, where texts hold control tokens on "
            f"purpose, or null, which reads what they spell as text"
        )
    try:
        date.fromisoformat(data.date or DATE)
    except ValueError:
        raise Refusal(f"{data.node}.date={data.date}: need a day as {DATE}, or null for that one") from None


def with_reading(shape: dict[str, Any]) -> dict[str, Any]:
    """Of `content_key`: settings that read texts as ever change no key."""
    return {name: value for name, value in shape.items() if name not in ("control_tokens", "date") or value is not None}
