"""Where text comes from: files, folders, hub datasets and the corpus that every Python carries.

A source is one of these, or a list of them:

    stdlib          the embedded corpus: the language reference and the standard library's docstrings
    ciphers         an embedded corpus of puzzles, which earlier lines of a document solve (pipeline/data/ciphers.py);
                    ciphers:noisy has wrong letters in it
    FILE            .txt, .jsonl, .json (an array of objects, or one object a line) or .parquet
    FOLDER          all such files in it and below, of one kind
    OWNER/NAME      a hub dataset, read at the split named like the field; OWNER/NAME:SPLIT chooses another

A document is a text, or a conversation where there is a messages column. It belongs to one split by the hash
of its content, so neither the order of the input nor a duplicate in it carries held-out text into training.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import json
import math
import mmap
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import Refusal

if TYPE_CHECKING:
    from datasets import Dataset
    from pyarrow import DataType
    from pyarrow.parquet import ParquetFile

SPLITS = ("train", "validation", "test")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
SEPARATOR = "<|endoftext|>"
_EMBEDDED = ("stdlib", "ciphers")
_SOON_READ = 2**20  # bytes of files that a check may read to the end

# How a .txt file becomes documents: one ends at the first blank line after so many characters, or at the
# first line end after so many more. A speech or a paragraph alone is too little context to learn from, and a
# whole file cannot be split three ways, so the default lies between them.
SAMPLE_BY = {
    "section": (4096, 8192),
    "line": (0, 0),
    "paragraph": (0, math.inf),
    "document": (math.inf, math.inf),
}

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # ShareGPT's names for the usual roles

Conversation = list[dict[str, Any]]  # each message has role and content, and a weight where it is not 1
Content = str | Conversation
Document = tuple[str, Content, float]  # where it stands, for messages; what it holds; its weight


@dataclass
class Data:
    """What to read and how it becomes rows: the node `data` of the configuration.

    `train`, `validation` and `test` are sources (see the module); of the last two, what is not given is taken
    out of `train`. A `messages` or `conversations` column makes a source chat, even beside a text column.

    `weight_column` names numbers of 0 or more, one for each document: what its tokens count in the loss, 1 being what
    they count without. A message's `weight` multiplies it for that turn of the assistant; without a weight_column
    it may be 0 or 1 only, as in OpenAI's format. What weighs 0 is not supervised.
    """

    train: Any = "stdlib"  # str | list[str], as the two below
    validation: Any = None
    test: Any = None
    name: str | None = None  # subset of a hub dataset
    revision: str | None = None  # commit, tag or branch of a hub dataset
    text_column: str = "text"
    messages_column: str | None = None
    weight_column: str | None = None  # of every document
    sample_by: str = "section"  # a document of a .txt file: section, line, paragraph or document (the file)
    chat_template: str | None = None  # jinja file, in place of the tokenizer's template
    max_length: int = 128  # tokens in a row
    packing: bool = True
    holdout: float = 0.05  # share of documents, for each held-out split that is not given
    max_documents: int | None = None  # in each split, the first ones read
    validation_rows: int | None = None
    node: ClassVar[str] = "data"

    @property
    def stops(self) -> list[str]:
        return []

    @property
    def made_by_stages(self) -> dict[str, str]:
        return {}

    @property
    def teacher_prompts(self) -> int:
        return 0

    def check(self, planned: bool = False) -> dict[str, Any]:
        return check(self)

    def holds(self, split: str) -> bool:
        sources = _sources(self, split) or _sources(self, "train")
        size = sum(path.stat().st_size for source in sources for path in source.files)
        if _sources(self, split) or not all(source.files for source in sources) or size > _SOON_READ:
            return True
        try:
            return len(documents(self, split)) > 0
        except Refusal:
            return False

    def content_key(self) -> str:
        return content_key(self)

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Dataset, dict[str, Any]]:
        from pipeline.data import packing  # which reads this module

        return packing.prepare(
            documents(self, split), tokenizer, self, folder=folder, teacher_tokenizer=teacher_tokenizer
        )


@dataclass(frozen=True)
class Source:
    """One source, found. `files` is empty for the embedded corpus and for hub datasets."""

    label: str  # as messages call it: data.train=corpus.jsonl
    name: str
    kind: str  # "stdlib", "ciphers", "files" or "hub"
    files: tuple[Path, ...] = ()
    hub_split: str = ""


@dataclass
class _Tally:
    read: int = 0
    kept: int = 0
    empty: int = 0
    digest: Any = field(default_factory=hashlib.sha256)  # of the kept documents, in order


def check(data: Data) -> dict[str, Any]:
    """Refuse what can be refused without reading the corpus, and describe the rest for the printed plan.

    Returns {"chat": bool, SPLIT: {"sources": [...], "bytes": int, "documents": int, "tokens_at_most": int}}, with None
    for what only reading would tell (a hub is not asked); a split to be taken out of train is {"holdout": fraction}.
    """
    if data.max_length < 2:
        raise Refusal(f"data.max_length={data.max_length}: need 2 tokens or more, the second is predicted")
    if data.sample_by not in SAMPLE_BY:
        raise Refusal(f"data.sample_by={data.sample_by}: choose one of {', '.join(SAMPLE_BY)}")
    if not 0 <= data.holdout < 0.5:
        raise Refusal(f"data.holdout={data.holdout}: need [0, 0.5); 0.05 takes 5 % for each held-out split")
    for name in ("max_documents", "validation_rows"):
        limit = getattr(data, name)
        if limit is not None and limit < 1:
            raise Refusal(f"data.{name}={limit}: need 1 or more, or null for all")
    if data.chat_template is not None and not Path(data.chat_template).expanduser().is_file():
        raise Refusal(f"data.chat_template={data.chat_template}: no such file; name a jinja file, or null")
    if not _sources(data, "train"):
        raise Refusal("data.train is not set: give a .txt, .jsonl or .parquet file, a folder or a hub id")

    plan: dict[str, Any] = {"chat": None}
    for split in SPLITS:
        sources = _sources(data, split)
        plan[split] = _described(sources) if sources else {"holdout": data.holdout}
        for source in sources:
            _check_weighable(data, source)
            chats = [False] if source.kind in _EMBEDDED else [_is_chat(data, path) for path in source.files]
            for chat in chats:
                if plan["chat"] not in (None, chat):
                    raise Refusal(f"{source.label}: text and chat cannot be mixed; give sources of one kind")
                plan["chat"] = chat
    return plan


def _described(sources: list[Source]) -> dict[str, Any]:
    files = [path for source in sources for path in source.files]
    readable = all(source.files for source in sources)
    size = sum(path.stat().st_size for path in files) if readable else None
    plain = not any(path.suffix == ".parquet" for path in files)  # the others are no smaller than their text
    return {
        "sources": [source.name for source in sources],
        "bytes": size,
        "documents": _count(files) if readable else None,
        # Whatever the tokenizer, unless a template adds to it: one a byte, and two at a document's ends.
        "tokens_at_most": 2 * size if size is not None and plain else None,
    }


def documents(data: Data, split: str, unanswered: bool = False) -> Dataset:
    """The documents of one split in reading order: a dataset with the single column `text` or `messages`.

    Files are held in memory as Arrow, about the size of their text; a hub dataset's text stays memory mapped.
    Empty documents are left out, and `empty_documents` of the result says how many. A held-out split has no
    rows when `holdout` is 0; that it gets none by chance is refused. `unanswered`: conversations in which the assistant
    says nothing are taken too, as what it may be asked.
    """
    from datasets import concatenate_datasets

    if split not in SPLITS:
        raise ValueError(f"split={split!r}: one of {', '.join(SPLITS)}")
    held_out = split != "train" and not _sources(data, split)
    given = "train" if held_out else split
    label = f"data.{given}={getattr(data, given)}"
    tally = _Tally()
    parts = [_part(data, source, split, tally, unanswered) for source in _sources(data, given)]
    if not tally.kept and held_out and data.holdout:
        raise Refusal(
            f"{label}: none of its {tally.read} documents falls to {split}; give data.{split}, a larger "
            "data.holdout (0 does without) or, of a .txt file, data.sample_by=paragraph"
        )
    if not tally.kept and not held_out:
        raise Refusal(f"{label}: none of its {tally.read} documents has text for {split}; give another source")
    parts = _of_one_kind([part for part in parts if len(part)] or parts[:1])
    if len({tuple(part.column_names) for part in parts}) > 1:
        raise Refusal(f"{label}: text and chat cannot be mixed; give sources of one kind")
    dataset = concatenate_datasets(parts)
    dataset.info.description = f"empty documents left out: {tally.empty}"
    return dataset


def empty_documents(dataset: Dataset) -> int:
    """How many empty documents `documents` left out of this dataset."""
    counted = re.search(r"empty documents left out: (\d+)", dataset.info.description or "")
    return int(counted[1]) if counted else 0


def content_key(data: Data) -> str:
    """A hash of what the sources hold and how it becomes rows: for one tokenizer, equal keys mean equal rows.

    Files count by their bytes and not by their names, the embedded corpus by the bytes of the standard
    library and the version of the Python that parses it, a hub dataset by its id, subset, revision and split.
    """
    content = {split: [_source_key(data, source) for source in _sources(data, split)] for split in SPLITS}
    shape = {key: value for key, value in vars(data).items() if key not in (*SPLITS, "validation_rows")}
    if data.chat_template is not None:
        shape["chat_template"] = Path(data.chat_template).expanduser().read_text(encoding="utf-8")
    return hashlib.sha256(json.dumps([content, shape], sort_keys=True).encode()).hexdigest()


def _source_key(data: Data, source: Source) -> list[Any]:
    if source.kind == "hub":
        return [source.name, source.hub_split]
    if source.kind == "ciphers":
        from pipeline.data import ciphers  # needs numpy, which the check of other sources does without

        return [source.name, ciphers.key()]
    key: list[Any] = [sys.version] if source.kind == "stdlib" else []
    for path in source.files or library_files():
        with path.open("rb") as file:
            key.append([path.suffix, hashlib.file_digest(file, "sha256").hexdigest()])
    return key


# Finding sources and columns


def _sources(data: Data, split: str) -> list[Source]:
    given = getattr(data, split)
    if given is None or given == "???":  # OmegaConf's mark for a value that the user must give
        return []
    names = [given] if isinstance(given, str | os.PathLike) else given
    return [_find(split, str(name)) for name in names]


def _find(split: str, name: str) -> Source:
    label = f"data.{split}={name}"
    path = Path(name).expanduser()
    if name == "stdlib":
        return Source(label, name, "stdlib")
    if name in ("ciphers", "ciphers:noisy"):
        return Source(label, name, "ciphers")
    if path.is_dir():
        return Source(label, name, "files", _files_in(path, label))
    if path.exists():
        if path.suffix not in SUFFIXES:
            raise Refusal(f"{label}: cannot read this kind of file; give one of {', '.join(SUFFIXES)}")
        if path.stat().st_size == 0:
            raise Refusal(f"{label}: the file is empty; give one with text in it")
        return Source(label, name, "files", (path,))
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+?)(?::([\w.-]+))?", name)
    # A relative path looks like a hub id too; it is a path if its suffix is known or its first folder exists.
    if hub and path.suffix not in SUFFIXES and not Path(path.parts[0]).is_dir():
        return Source(label, hub[1], "hub", hub_split=hub[2] or split)
    raise Refusal(
        f"{label}: no such file or folder, nor is it a hub dataset id (OWNER/NAME) or the word stdlib or ciphers"
    )


def _files_in(folder: Path, label: str) -> tuple[Path, ...]:
    inside = (path for path in folder.rglob("*") if path.suffix in SUFFIXES and path.is_file())
    visible = (path for path in inside if not any(part[0] == "." for part in path.relative_to(folder).parts))
    files = sorted(path for path in visible if path.stat().st_size)
    if not files:
        raise Refusal(f"{label}: the folder holds no {', '.join(SUFFIXES)} file with text in it")
    kinds = sorted({path.suffix.replace("jsonl", "json") for path in files})
    if len(kinds) > 1:
        largest = max(files, key=lambda path: path.stat().st_size)
        raise Refusal(f"{label}: the folder mixes {' and '.join(kinds)} files; name what to read, as {largest}")
    return tuple(files)


def _column(data: Data, columns: Iterable[str], where: str) -> tuple[str, bool]:
    """The column to read, and whether it holds conversations."""
    for name in [data.messages_column] if data.messages_column else ["messages", "conversations"]:
        if name in columns:
            return name, True
    if not data.messages_column and data.text_column in columns:
        return data.text_column, False
    key = "messages_column" if data.messages_column else "text_column"
    found = ", ".join(columns) or "nothing"
    raise Refusal(f"{where}: data.{key}={getattr(data, key)} is no column of it; it has {found}")


def _with_weight(data: Data, column: str, columns: Iterable[str], where: str) -> list[str]:
    """The columns to read: the one of text or messages, and the weight's if one is named."""
    if data.weight_column is None:
        return [column]
    if data.weight_column not in columns or data.weight_column == column:
        found = ", ".join(name for name in columns if name != column) or "nothing"
        raise Refusal(
            f"{where}: data.weight_column={data.weight_column} is no column of numbers; beside {column} it has {found}"
        )
    return [column, data.weight_column]


def _check_weighable(data: Data, source: Source) -> None:
    if data.weight_column is None:
        return
    if source.kind in _EMBEDDED or any(path.suffix == ".txt" for path in source.files):
        raise Refusal(
            f"{source.label}: it has no columns, so no data.weight_column={data.weight_column}; set it to null"
        )
    for path in source.files:
        columns = _columns(path)
        _with_weight(data, _column(data, columns, str(path))[0], columns, str(path))


def _columns(path: Path) -> list[str]:
    """The columns of a .parquet file; of .jsonl and .json files the keys of the first object."""
    if path.suffix == ".parquet":
        return list(parquet(path).schema_arrow.names)
    return list(next(objects(path), ("", {}))[1])


def _is_chat(data: Data, path: Path) -> bool:
    if path.suffix == ".txt" and data.messages_column:
        raise Refusal(f"{path}: a .txt file has no column data.messages_column={data.messages_column}; set it to null")
    return path.suffix != ".txt" and _column(data, _columns(path), str(path))[1]


def _count(files: list[Path]) -> int | None:
    """Documents in these files, where that is cheap to know."""
    if all(file.suffix == ".parquet" for file in files):
        return sum(int(parquet(file).metadata.num_rows) for file in files)
    if all(file.suffix == ".jsonl" for file in files) and sum(file.stat().st_size for file in files) < 2**28:
        return sum(1 for file in files for line in file.read_bytes().splitlines() if line.strip())
    return None


# Reading documents


def _part(data: Data, source: Source, split: str, tally: _Tally, unanswered: bool = False) -> Dataset:
    """The documents of one source that belong to the split."""
    from datasets import Value

    _check_weighable(data, source)
    if source.kind == "hub":
        dataset = _hub_dataset(data, source)
        column, chat = _column(data, dataset.column_names, source.label)
        columns = _with_weight(data, column, dataset.column_names, source.label)
        dataset = dataset.select_columns(columns)
        rows = chain.from_iterable(zip(*(batch[name] for name in columns), strict=True) for batch in dataset.iter(1000))
        read = _documents(((f"{source.label} row {i}", row) for i, row in enumerate(rows)), chat, unanswered)
        if not chat:
            indices = [index for index, _, _ in _chosen(data, read, split, tally)]
            texts = dataset.rename_columns(dict(zip(columns, ("text", "weight"), strict=False)))
            if data.weight_column is not None and texts.features["weight"] != Value("float64"):
                texts = texts.cast_column("weight", Value("float64"))
            return texts.select(indices)
    elif source.kind == "stdlib":
        chat, read = False, (("stdlib", text, 1.0) for text in library_documents())
    elif source.kind == "ciphers":
        from pipeline.data import ciphers

        chat, read = False, ((source.name, text, 1.0) for text in ciphers.documents("noisy" in source.name))
    else:
        chat = _is_chat(data, source.files[0])
        read = chain.from_iterable(_read_file(data, path, chat, unanswered) for path in source.files)
    values = ((value, weight) for _, value, weight in _chosen(data, read, split, tally))
    return _in_memory(values, chat, data.weight_column is not None, tally)


def _chosen(data: Data, read: Iterable[Document], split: str, tally: _Tally) -> Iterator[tuple[int, Content, float]]:
    """The documents of the split and their weights, with their place in the source; counted and hashed on the way."""
    every = split != "train" and bool(_sources(data, split))
    for index, (where, value, weight) in enumerate(read):
        if tally.kept == data.max_documents:
            return
        tally.read += 1
        content = value if isinstance(value, str) else _unweighted(value)
        try:
            digest = hashlib.sha256(content.encode()).digest()
        except UnicodeEncodeError as error:
            raise Refusal(f"{where}: holds half a surrogate pair, which is no text; mend or drop it") from error
        if not every and _split_of(data, digest) != split:
            continue
        if not value or (isinstance(value, str) and value.isspace()):
            tally.empty += 1
            continue
        tally.kept += 1
        tally.digest.update(digest)
        yield index, value, weight


def _split_of(data: Data, digest: bytes) -> str:
    """The split of a document of train: test and validation own fixed ranges of the hash, unless given."""
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    if fraction < data.holdout:
        return "train" if data.test else "test"
    if fraction < 2 * data.holdout:
        return "train" if data.validation else "validation"
    return "train"


def _unweighted(messages: Conversation) -> str:
    """What the split of a conversation depends on: a copy that only weighs otherwise falls to the same."""
    told = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    return json.dumps(told, ensure_ascii=False, sort_keys=True)


def _in_memory(values: Iterator[tuple[Content, float]], chat: bool, weighted: bool, tally: _Tally) -> Dataset:
    import pyarrow as pa
    from datasets import Dataset

    name = "messages" if chat else "text"
    tables = []
    while chunk := list(islice(values, 1000)):  # so that Python strings of only one chunk exist at a time
        contents, weights = zip(*chunk, strict=True)
        differ = chat and any("weight" in message for messages in contents for message in messages)
        table = pa.table({name: pa.array(contents, type=_message_lists(differ) if chat else pa.string())})
        tables.append(table.append_column("weight", pa.array(weights, pa.float64())) if weighted else table)
    empty = pa.schema(
        {name: _message_lists(False) if chat else pa.string()} | ({"weight": pa.float64()} if weighted else {})
    )
    return Dataset(
        pa.concat_tables([empty.empty_table(), *tables], promote_options="permissive"),
        fingerprint=tally.digest.hexdigest()[:16],
    )


def _message_lists(weighted: bool) -> DataType:
    import pyarrow as pa

    weight = {"weight": pa.float64()} if weighted else {}
    return pa.list_(pa.struct({"role": pa.string(), "content": pa.string()} | weight))


def _of_one_kind(parts: list[Dataset]) -> list[Dataset]:
    """The parts, all with message weights if one has them: datasets itself does not join different messages."""
    from datasets import Dataset

    schemas = {part.data.schema.remove_metadata() for part in parts}
    weighing = [schema for schema in schemas if schema.names[0] == "messages" and "weight" in str(schema.field(0).type)]
    if len(schemas) == 1 or not weighing or any(schema.names != weighing[0].names for schema in schemas):
        return parts
    return [Dataset(part.data.table.cast(weighing[0])) for part in parts]


def _hub_dataset(data: Data, source: Source) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(source.name, name=data.name, revision=data.revision, split=source.hub_split)
    except Exception as error:  # the hub's client raises a dozen kinds, all of which the user can mend
        reason = " ".join(str(error).split())
        raise Refusal(
            f"{source.label}: no such file or folder here, and the hub dataset (data.name={data.name}, "
            f"data.revision={data.revision}, split {source.hub_split}) does not load: {reason}"
        ) from error


def _read_file(data: Data, path: Path, chat: bool, unanswered: bool = False) -> Iterator[Document]:
    """The documents of one file."""
    if path.suffix == ".txt":
        return ((str(path), text, 1.0) for text in _text_documents(path, data.sample_by))
    found = _columns(path)
    column, found_chat = _column(data, found, str(path))
    if found_chat != chat:
        raise Refusal(f"{path}: text and chat cannot be mixed, as with the files before it; give one kind")
    cells = _parquet_cells if path.suffix == ".parquet" else _json_cells
    return _documents(cells(path, _with_weight(data, column, found, str(path))), chat, unanswered)


def _documents(
    cells: Iterable[tuple[str, tuple[Any, ...]]], chat: bool, unanswered: bool = False
) -> Iterator[Document]:
    """From the cells of the text's or messages' column, and of the weight's where there is one."""
    for where, (cell, *weights) in cells:
        weight = _weight(weights[0], where) if weights else 1.0
        if cell is None:
            yield where, "", weight
        elif chat:
            yield where, conversation(cell, where, unanswered), weight
        elif isinstance(cell, str):
            yield where, cell, weight
        else:
            raise Refusal(f"{where}: holds {type(cell).__name__} {str(cell)[:40]!r} where text is needed")


def _weight(value: Any, where: str) -> float:
    # Beyond 1e9 no weight is meant, and float32 could not hold what a document's and a message's make together.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1e9:
        raise Refusal(f"{where}: has weight {str(value)[:40]}; need a number from 0 to 1e9, 1 for what counts as usual")
    return float(value)


def conversation(cell: Any, where: str, unanswered: bool = False) -> Conversation:
    """Messages of role and content, also from ShareGPT's from and value, and a weight where it is not 1."""
    if not isinstance(cell, list):
        raise Refusal(f"{where}: holds {type(cell).__name__} where a list of messages is needed")
    messages: Conversation = []
    for number, message in enumerate(cell):
        fields = message if isinstance(message, dict) else {}
        role = fields.get("role") or fields.get("from")
        content = fields.get("content") if fields.get("content") is not None else fields.get("value")
        if not isinstance(role, str) or not isinstance(content, str) or fields.get("tool_calls"):
            raise Refusal(
                f"{where}: message {number} is not a role and a text content; mend or drop the conversation "
                "(tool calls and images are not supported)"
            )
        messages.append({"role": ROLES.get(role, role), "content": content})
        weight = fields.get("weight")
        if weight is not None and _weight(weight, f"{where}: message {number}") != 1:
            messages[-1]["weight"] = float(weight)
    if messages and not unanswered and all(message["role"] != "assistant" for message in messages):
        raise Refusal(f"{where}: no message is the assistant's, so there is nothing to learn; drop it")
    return messages


def _text_documents(path: Path, sample_by: str) -> Iterator[str]:
    """The documents of a .txt file, without blank lines around them.

    `<|endoftext|>` always separates documents, and a file that has it is not cut into sections.
    """
    blank_line, line_end = SAMPLE_BY[sample_by]
    if sample_by == "section" and _holds(path, SEPARATOR.encode()):
        blank_line = line_end = math.inf
    lines: list[str] = []
    size = 0
    with path.open(encoding="utf-8-sig") as file:
        try:
            for line in file:
                *closed, line = line.split(SEPARATOR)
                for part in closed:
                    yield from _joined([*lines, part])
                    lines, size = [], 0
                if lines or not line.isspace():
                    lines.append(line)
                    size += len(line)
                if size > line_end or (size > blank_line and line.isspace()):
                    yield from _joined(lines)
                    lines, size = [], 0
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}: not UTF-8 text ({error}); convert it, for example with iconv") from error
    yield from _joined(lines)


def _joined(lines: list[str]) -> list[str]:
    text = "".join(lines).rstrip()
    return [text] if text else []


def _holds(path: Path, word: bytes) -> bool:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(word) >= 0


def parquet(path: Path) -> ParquetFile:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        return ParquetFile(path, memory_map=True)
    except pyarrow.ArrowInvalid as error:
        raise Refusal(f"{path}: not a readable parquet file ({error}); write it again") from error


def _parquet_cells(path: Path, columns: list[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    batches = parquet(path).iter_batches(batch_size=1000, columns=columns)
    rows = chain.from_iterable(zip(*(b.column(name).to_pylist() for name in columns), strict=True) for b in batches)
    return ((f"{path} row {i}", row) for i, row in enumerate(rows))


def _json_cells(path: Path, columns: list[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    for where, record in objects(path):
        for column in columns:
            if column not in record:
                raise Refusal(f"{where}: no column {column}, unlike the first object; it has {', '.join(record)}")
        yield where, tuple(record[column] for column in columns)


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl or .json file, each with where it stands."""
    with path.open(encoding="utf-8-sig") as file:
        where = str(path)
        try:
            array = path.suffix == ".json" and file.read(4096).lstrip().startswith("[")
            file.seek(0)
            for number, item in enumerate(json.load(file) if array else file, start=1):
                where = f"{path} {'item' if array else 'line'} {number}"
                if not array and item.isspace():
                    continue
                record = item if array else json.loads(item)
                if not isinstance(record, dict):
                    raise Refusal(f"{where}: holds {type(record).__name__} where an object is needed")
                yield where, record
        except json.JSONDecodeError as error:
            raise Refusal(f"{where}: not JSON ({error}); write one object a line, or one array") from error
        except UnicodeDecodeError as error:
            raise Refusal(f"{path}: not UTF-8 text ({error}); convert it, for example with iconv") from error


# The embedded corpus


def library_files() -> list[Path]:
    """The source files of Python's standard library in a fixed order, without installed packages and tests.

    The folders `test`, `tests` and `idle_test` are left out: Linux distributions drop them, and their
    docstrings say little.
    """
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, names, found in os.walk(root):
        names[:] = sorted(set(names) - skipped)
        files += [Path(folder, name) for name in sorted(found) if name.endswith(".py")]
    if not files:
        raise Refusal(f"data.train=stdlib: this Python keeps no sources in {root}; give a file of your own")
    return files


@cache
def library_documents() -> tuple[str, ...]:
    """The embedded corpus: the language reference, then every docstring of over 80 characters, each once.

    Modules are parsed and never imported; all takes about 2 s. On Python 3.11 these are 4,522 documents and
    2.05 M characters, on another Python somewhat others.
    """
    from pydoc_data.topics import topics

    texts = [topics[name].strip() for name in sorted(topics)]
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is many objects and no garbage: looking for it would be a fifth of the time
    try:
        for path in library_files():
            texts += _docstrings(path.read_bytes())
    finally:
        if collecting:
            gc.enable()
    return tuple(dict.fromkeys(texts))


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        try:
            nodes: list[ast.AST] = [ast.parse(source)]
        except (SyntaxError, ValueError):  # templates and deliberately broken files
            return
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) > 80:
                yield text
        children = list(ast.iter_child_nodes(node))
        nodes += [child for child in reversed(children) if isinstance(child, ast.stmt | ast.excepthandler)]
