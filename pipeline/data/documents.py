"""Documents: texts and conversations from files, folders, hub datasets and the embedded corpora, in three splits.

A document is a text, or a conversation where there is a messages column. It belongs to one split by the hash
of its content, so neither the order of the input nor a duplicate in it carries held-out text into training.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import Refusal
from models.files import hash_of
from pipeline.data.columns import Columns
from pipeline.data.locations import EMBEDDED, Location, locate
from pipeline.data.readers import (
    SAMPLE_BY,
    count_documents,
    hub_dataset,
)
from pipeline.data.reading import embedded_documents, file_documents, hub_documents
from pipeline.data.rendering import template_file
from pipeline.data.source import SPLITS, DataSource, Prompt, check_reading, with_reading
from pipeline.data.splits import NoDocuments, Split, Tally, chosen
from pipeline.data.stdlib import library_files
from pipeline.data.tables import in_memory, of_one_kind, with_empty
from pipeline.hashes import file_hashes

if TYPE_CHECKING:
    from datasets import Dataset

    from pipeline.data.parts import Parts
    from pipeline.data.sequences import Sequences

_OF_NO_SEQUENCE = ("validation_sequences", "workers")  # settings that change none
_SOON_READ = 2**20  # bytes of files that a check may read to the end


@dataclass
class Documents(DataSource):
    """What to read and how it becomes packed sequences: the node `data` of the configuration.

    `train`, `validation` and `test` are sources (pipeline/data/locations.py); of the last two, what is not given is
    taken out of `train`. A `messages` or `conversations` column makes a source chat, even beside a text column.

    `weight_column` names numbers of 0 or more, one for each document: what its tokens count in the loss, 1 being what
    they count without. A message's `weight` multiplies it for that turn of the assistant; without a weight_column
    it may be 0 or 1 only, as in OpenAI's format. What weighs 0 is not supervised.
    """

    train: str | Sequence[str] = "stdlib"
    validation: str | Sequence[str] | None = None
    test: str | Sequence[str] | None = None
    name: str | None = None  # subset of a hub dataset
    revision: str | None = None  # commit, tag or branch of a hub dataset
    text_column: str = "text"
    messages_column: str | None = None
    weight_column: str | None = None  # of every document
    sample_by: str = "section"  # a document of a .txt file: section, line, paragraph or document (the file)
    chat_template: str | None = None  # jinja file, in place of the tokenizer's template
    date: str | None = None  # that chat templates are told for today's
    control_tokens: str | None = None  # parse: what texts spell (`</s>`) is read as control tokens, not as text
    max_length: int = 128  # tokens in a packed sequence
    packing: bool = True
    holdout: float = 0.05  # share of documents, for each held-out split that is not given
    max_documents: int | None = None  # in each split, the first ones read
    validation_sequences: int | None = None
    workers: int | None = None  # processes that tokenize; None: one a core
    node: ClassVar[str] = "data"
    compared_by_content: ClassVar[frozenset[str]] = frozenset({*SPLITS, "chat_template"})
    immaterial: ClassVar[frozenset[str]] = frozenset({"workers"})

    @property
    def columns(self) -> Columns:
        return Columns(self.text_column, self.messages_column, self.weight_column)

    def locations(self, split: str) -> list[Location]:
        """What a split is given as; nothing where it is taken out of train."""
        return locate(split, getattr(self, split))

    def split(self, name: str) -> Split:
        held_out = name != "train" and not self.locations(name)
        given = "train" if held_out else name
        label = f"data.{given}={getattr(self, given)}"
        own = frozenset(other for other in SPLITS if getattr(self, other))
        return Split(name, label, held_out, own, self.holdout, self.max_documents)

    def check(self, planned: bool = False) -> dict[str, Any]:
        if self.workers is not None and self.workers < 1:
            raise Refusal(f"{self.node}.workers={self.workers}: need a number above 0, or null for one a core")
        return check(self)

    def holds(self, split: str) -> bool:
        if split != "train" and not self.locations(split) and not self.holdout:
            return False
        locations = self.locations(split) or self.locations("train")
        size = sum(path.stat().st_size for location in locations for path in location.files)
        if self.locations(split) or not all(location.files for location in locations) or size > _SOON_READ:
            return True
        try:
            return len(documents(self, split)) > 0
        except NoDocuments:
            return False

    def content_key(self) -> str:
        return content_key(self)

    def sample(self, documents: int) -> Documents:
        return replace(self, max_documents=min(documents, self.max_documents or documents))

    def texts(self, split: str) -> Iterable[str]:
        found = documents(self, split)
        if "text" not in found.column_names:
            raise Refusal(f"data.{split}: it holds conversations, and no tokenizer is trained on them; name one")
        return found["text"]

    def prompts(self, split: str, tokenizer: Any, prompt_tokens: int | None, tally: Counter[str]) -> Iterator[Prompt]:
        from pipeline.data.prompts import prompts_of  # lazily, as above

        return prompts_of(documents(self, split, unanswered=True), tokenizer, self, prompt_tokens, tally)

    def parts(self, split: str) -> Parts | None:
        if self.max_documents is not None:  # the first ones, which only whoever reads all of them can count
            return None
        from pipeline.data.document_parts import DocumentParts

        given = self.locations(split) or self.locations("train")
        return DocumentParts(self.split(split), given, self.columns, self.sample_by, self.name, self.revision)

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Sequences, dict[str, Any]]:
        from pipeline.data import packing  # lazily: a check is to load neither numpy nor torch

        def text() -> Parts | Dataset:
            return self.parts(split) or documents(self, split)

        return packing.prepare(text, tokenizer, self, folder=folder, teacher_tokenizer=teacher_tokenizer)


def check(data: Documents) -> dict[str, Any]:
    """Refuse what can be refused without reading the corpus, and describe the rest for the printed plan.

    Returns {"chat": bool, SPLIT: {"sources": [...], "bytes": int, "documents": int, "tokens_at_most": int}}, with None
    for what only reading would show (a hub is not asked); a split to be taken out of train is {"holdout": fraction}.
    """
    if data.max_length < 2:
        raise Refusal(f"data.max_length={data.max_length}: need 2 tokens or more, the second is predicted")
    if data.sample_by not in SAMPLE_BY:
        raise Refusal(f"data.sample_by={data.sample_by}: choose one of {', '.join(SAMPLE_BY)}")
    if not 0 <= data.holdout < 0.5:
        raise Refusal(f"data.holdout={data.holdout}: need [0, 0.5); 0.05 takes 5 % for each held-out split")
    for name in ("max_documents", "validation_sequences"):
        limit = getattr(data, name)
        if limit is not None and limit < 1:
            raise Refusal(f"data.{name}={limit}: need 1 or more, or null for all")
    check_reading(data)
    if data.chat_template is not None:
        if not Path(data.chat_template).expanduser().is_file():
            raise Refusal(f"data.chat_template={data.chat_template}: no such file; name a jinja file, or null")
        template_file(data.chat_template, f"data.chat_template={data.chat_template}")
    if not data.locations("train"):
        raise Refusal("data.train is not set: give a .txt, .jsonl or .parquet file, a folder or a hub id")

    plan: dict[str, Any] = {"chat": None}
    for split in SPLITS:
        locations = data.locations(split)
        plan[split] = _described(locations) if locations else {"holdout": data.holdout}
        for location in locations:
            data.columns.check_weighable(location)
            chats = [False] if location.kind in EMBEDDED else [data.columns.is_chat(path) for path in location.files]
            for chat in chats:
                if plan["chat"] not in (None, chat):
                    raise Refusal(f"{location.label}: text and chat cannot be mixed; give sources of one kind")
                plan["chat"] = chat
    return plan


def _described(locations: list[Location]) -> dict[str, Any]:
    files = [path for location in locations for path in location.files]
    readable = all(location.files for location in locations)
    size = sum(path.stat().st_size for path in files) if readable else None
    plain = not any(path.suffix == ".parquet" for path in files)  # the others are no smaller than their text
    return {
        "sources": [location.name for location in locations],
        "bytes": size,
        "documents": count_documents(files) if readable else None,
        # Whatever the tokenizer, unless a template adds to it: one a byte, and two at a document's ends.
        "tokens_at_most": 2 * size if size is not None and plain else None,
    }


def documents(data: Documents, split: str, unanswered: bool = False) -> Dataset:
    """The documents of one split in reading order: a dataset with the single column `text` or `messages`.

    Files are held in memory as Arrow, about the size of their text; a hub dataset's text stays memory mapped.
    Empty documents are left out, and `empty_documents` of the result is how many. A held-out split has no
    documents when `holdout` is 0; that it gets none by chance is refused. `unanswered`: conversations in which the
    assistant says nothing are taken too, as what it may be asked.
    """
    from datasets import concatenate_datasets

    if split not in SPLITS:
        raise ValueError(f"split={split!r}: one of {', '.join(SPLITS)}")
    wanted = data.split(split)
    tally = Tally()
    parts = [
        _part(data, location, wanted, tally, unanswered)
        for location in data.locations("train" if wanted.held_out else split)
    ]
    wanted.check_some(tally.read, tally.kept)
    parts = of_one_kind([part for part in parts if len(part)] or parts[:1])
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise Refusal(f"{wanted.label}: text and chat cannot be mixed; give sources of one kind")
    return with_empty(concatenate_datasets(parts), tally.empty)


def content_key(data: Documents) -> str:
    """A hash of what the sources hold and how it becomes sequences: for one tokenizer, equal keys mean equal sequences.

    Files count by their bytes and not by their names, the embedded corpus by the bytes of the standard
    library and the version of the Python that parses it, a hub dataset by its id, subset, revision and split.
    """
    content = {split: [_source_key(location) for location in data.locations(split)] for split in SPLITS}
    shape = {key: value for key, value in vars(data).items() if key not in (*SPLITS, *_OF_NO_SEQUENCE)}
    shape = with_reading(shape)
    if data.chat_template is not None:
        shape["chat_template"] = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
    return hash_of([content, shape])


def _source_key(location: Location) -> list[Any]:
    if location.kind == "hub":
        return [location.name, location.hub_split]
    if location.kind == "ciphers":
        from pipeline.data import ciphers  # needs numpy, which the check of other sources does without

        return [location.name, ciphers.key()]
    key: list[Any] = [sys.version] if location.kind == "stdlib" else []
    files = location.files or library_files()
    return [*key, *([path.suffix, told] for path, told in zip(files, file_hashes(files), strict=True))]


# Reading


def _part(data: Documents, location: Location, split: Split, tally: Tally, unanswered: bool = False) -> Dataset:
    """The documents of one source that belong to the split."""
    from datasets import Value

    data.columns.check_weighable(location)
    if location.kind == "hub":
        dataset = hub_dataset(location, data.name, data.revision)
        column, chat = data.columns.chosen(dataset.column_names, location.label)
        read = hub_documents(data.columns, location, dataset, unanswered=unanswered)
        if not chat:
            columns = data.columns.with_weight(column, dataset.column_names, location.label)
            dataset = dataset.select_columns(columns)
            indices = [int(where.rpartition(" ")[2]) for where, _, _ in chosen(split, read, tally)]
            texts = dataset.rename_columns(dict(zip(columns, ("text", "weight"), strict=False)))
            if data.weight_column is not None and texts.features["weight"] != Value("float64"):
                texts = texts.cast_column("weight", Value("float64"))
            return texts.select(indices)
    elif location.kind in EMBEDDED:
        chat, read = False, embedded_documents(location)
    else:
        chat = data.columns.is_chat(location.files[0])
        read = chain.from_iterable(
            file_documents(data.columns, data.sample_by, path, chat, unanswered) for path in location.files
        )
    values = ((value, weight) for _, value, weight in chosen(split, read, tally))
    return in_memory(values, chat, data.weight_column is not None, lambda: tally.digest.hexdigest()[:16])
