"""A task: queries with answers, and what a teacher is shown before a query that a student is not.

In-context distillation: the teacher reads `context`, some demonstrations and the query; the student reads the query
alone, and learns to answer as the teacher does (arXiv:2212.10670; of instructions and documents, arXiv:2209.15189).

Prompts are texts made by templates, tokenized as a whole; an answer's tokens are those that the student's prompt and
answer have beyond the prompt's own, or, where a token would reach across, the answer's by itself (`across` counts it):
so that a prompt is the same with and without its answer. Spaces at a prompt's end belong to its answer.
"""

from __future__ import annotations

import csv
import hashlib
import json
import string
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from models.errors import Refusal
from models.questions import Question
from pipeline.data import ciphers
from pipeline.data.pairs import Pair, cut, write_rows
from pipeline.data.readers import objects, parquet
from pipeline.data.source import DataSource, Prompt
from pipeline.data.tokenizer import begin_token

if TYPE_CHECKING:
    from datasets import Dataset

SELECTIONS = ("fixed", "random", "nearest")
TOO_LONG = ("refuse", "fewer", "drop")
_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


@dataclass(frozen=True)
class Example:
    """A query and its answer as text; `choices`: the texts it is chosen from, if it is."""

    query: str
    answer: str
    context: str
    choices: tuple[str, ...] = ()

    @property
    def asked(self) -> str:
        """What the student reads: examples that are alike in it belong to one split, and never show each other."""
        return self.query.rstrip()


@dataclass(frozen=True)
class Item:
    """An example in tokens: what a student reads, what a teacher reads (once for each draw), and what both answer."""

    example: Example
    prompt: list[int]
    teacher_prompts: list[list[int]]
    answer: list[int]
    choices: list[list[int]]
    across: bool
    left_out: int  # demonstrations that the teacher's prompt had no room for


@dataclass
class Task(DataSource):
    """`train` and `test`: a .jsonl, .json, .csv or .parquet file, a hub id OWNER/NAME, or ciphers:NUMBER."""

    train: Any
    test: Any = None  # None: held out of train, by the query's hash
    name: str | None = None  # subset of a hub dataset
    revision: str | None = None  # commit, tag or branch of a hub dataset
    query: str = "{query}"  # templates name columns in braces
    answer: str = "{answer}"
    label: str | None = None  # a column of numbers that choose among `choices`, in place of `answer`
    choices: Any = None  # the possible answers, or the name of a column that lists them; None: answers are free text
    context: str = ""  # before the demonstrations, for the teacher alone: an instruction, a document
    separator: str = "\n"  # ends an answer, is learnt as such, and stands between demonstrations
    shots: int = 4  # demonstrations before a query
    selection: str = "fixed"  # random: others for every query; nearest: the most alike, the nearest last
    draws: int = 1  # prompts with other demonstrations, whose distributions are averaged
    max_length: int = 128  # tokens of the student's prompt and answer
    teacher_max_length: int = 512
    too_long: str = "refuse"  # drop: leaves the query out; fewer: first some demonstrations, then the query; counted
    holdout: float = 0.2
    max_queries: int | None = None  # in each split
    validation_sequences: int | None = None
    packing: bool = False
    seed: int = 0
    chat_template: str | None = field(default=None, init=False)
    node: ClassVar[str] = "task"

    @property
    def stops(self) -> list[str]:
        return [self.separator]

    @property
    def whole_prompts(self) -> bool:
        return True

    @property
    def teacher_prompts(self) -> int:
        """Without context and demonstrations the teacher reads the student's prompt."""
        return self.draws if self.shots or self.context else 0

    # What can be said without a tokenizer

    def check(self, planned: bool = False) -> dict[str, Any]:
        for name, least in (("shots", 0), ("draws", 1), ("max_length", 2), ("teacher_max_length", 2)):
            if getattr(self, name) < least:
                raise Refusal(f"task.{name}={getattr(self, name)}: need {least} or more")
        for name in ("query", "answer", "context"):
            if not isinstance(getattr(self, name), str):
                raise Refusal(
                    f"task.{name}={getattr(self, name)}: need a text that names columns in braces"
                    + ("; an empty one shows no context" if name == "context" else "")
                )
        shared = _columns(self.query) & _columns(self.answer) if not self.label else set()
        if shared:
            raise Refusal(
                f"task.query={self.query!r} names {{{min(shared)}}}, as task.answer does: the student would read what "
                f"it is to answer; leave it out of one of them"
            )
        if self.selection not in SELECTIONS:
            raise Refusal(f"task.selection={self.selection}: need one of {', '.join(SELECTIONS)}")
        if self.too_long not in TOO_LONG:
            raise Refusal(f"task.too_long={self.too_long}: need one of {', '.join(TOO_LONG)}")
        if not 0 <= self.holdout < 0.5:
            raise Refusal(f"task.holdout={self.holdout}: need [0, 0.5); 0.2 keeps every fifth query for the test")
        if self.draws > 1 and self.packing:
            raise Refusal("task.draws: several prompts a query are not packed; set task.packing=false")
        if self.draws > 1 and (self.selection != "random" or not self.shots):
            raise Refusal(
                f"task.draws={self.draws}: with selection={self.selection} and shots={self.shots} all draws are alike; "
                f"use task.selection=random with some shots"
            )
        if not self.separator:
            raise Refusal("task.separator is empty, so no answer would end; use a line end or another mark")
        if self.label and not self.choices:
            raise Refusal(f"task.label={self.label}: its numbers choose among task.choices, which is not set")
        if isinstance(self.choices, list) and len(set(self.choices)) < 2:
            raise Refusal(f"task.choices={self.choices}: a task with one answer has nothing to teach; give two or more")
        for split in ("train", "test"):
            if getattr(self, split) is not None:
                where, record = next(self._records(split), ("", None))
                if record is None:
                    raise Refusal(f"task.{split}={getattr(self, split)}: it holds no query; give a file with some")
                self._example(where, record)
        if "{" not in self.query:
            raise Refusal(
                f"task.query={self.query!r} names no column, so all queries are alike; name one, as {{question}}"
            )
        self.examples("train")  # all of it is read: a bad line is told before a stage has run
        return {"chat": False, "train": {"sources": [str(self.train)], "bytes": None, "documents": None}}

    def holds(self, split: str) -> bool:
        return bool(self.examples(split))

    def content_key(self) -> str:
        apart = ("train", "test", "validation_sequences")
        shape = {name: value for name, value in vars(self).items() if name not in apart and not name.startswith("_")}
        content = [None if source is None else _source_key(source) for source in (self.train, self.test)]
        return hashlib.sha256(json.dumps([content, shape], sort_keys=True, default=str).encode()).hexdigest()

    def examples(self, split: str) -> list[Example]:
        """Of train, validation or test; what demonstrates is in none of them."""
        return self._splits[split]

    @property
    def demonstrations(self) -> list[Example]:
        """From which the teacher is shown: of `fixed` those that all queries get, else the training queries."""
        return self._splits["demonstrations"]

    @cached_property
    def _splits(self) -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
        for split in ("train", "test"):
            for where, record in self._records(split):
                example = self._example(where, record)
                found[split if split == "test" else self._split_of(example)].append(example)
        held_out = {example.asked for example in found["test"]}
        for split in ("train", "validation"):
            found[split] = [each for each in found[split] if each.asked not in held_out]
        # Files are often sorted by class: whoever takes the first ones takes some of all.
        for split, examples in found.items():
            order = self._random(split, "order").permutation(len(examples))
            found[split] = [examples[number] for number in order]
        if not found["train"]:
            raise Refusal(f"task.train={self.train}: it holds no query to learn from")
        pool = found["train"]
        if self.selection == "fixed":
            pool = [found["train"][i] for i in self._random("fixed").permutation(len(found["train"]))[: self.shots]]
            shown = {each.asked for each in pool}
            found["train"] = [each for each in found["train"] if each.asked not in shown]
        if len(pool) < self.shots or not found["train"]:
            raise Refusal(
                f"task.shots={self.shots}: queries of task.train to show: {len(pool)}; give more, or ask for fewer"
            )
        if self.max_queries is not None:
            found = {split: each[: self.max_queries] for split, each in found.items()}
        for split in ("train", *(("test",) if self.choices and found["test"] else ())):
            if len({example.answer for example in found[split]}) < 2:
                raise Refusal(
                    f"task.train={self.train}: in {split} every answer is {found[split][0].answer!r}; a task with one "
                    f"answer has nothing to teach: add queries with others"
                )
        return found | {"demonstrations": pool}

    def _split_of(self, example: Example) -> str:
        digest = hashlib.sha256(example.asked.encode()).digest()
        at = int.from_bytes(digest[:8], "big") / 2**64
        if at < self.holdout:
            return "train" if self.test else "test"
        return "validation" if at < self.holdout + min(self.holdout, 0.05) else "train"

    def _example(self, where: str, record: dict[str, Any]) -> Example:
        def filled(name: str, template: str) -> str:
            try:
                parts = list(string.Formatter().parse(template))
            except ValueError as error:
                raise Refusal(f"task.{name}={template!r}: {error}; double a brace that names no column") from None
            if odd := [text for _, _, form, conversion in parts for text in (form, conversion) if text]:
                raise Refusal(f"task.{name}={template!r}: columns are put in as they are; leave {odd[0]!r} out")
            wanted = [column for _, column, _, _ in parts if column is not None]
            if missing := [column for column in wanted if record.get(column) is None]:
                there = f"it has {', '.join(record) or 'nothing'}"
                raise Refusal(
                    f"{where}: task.{name}={template!r} names {{{missing[0]}}}, and "
                    + ("that is null here; drop it" if missing[0] in record else f"{there}; set task.{name} to fit")
                )
            # Not str.format, which would also look inside of what it puts in.
            return "".join(text + ("" if column is None else str(record[column])) for text, column, _, _ in parts)

        choices: tuple[str, ...] = ()
        if isinstance(self.choices, str):
            listed = record.get(self.choices)
            if not isinstance(listed, list) or len(listed) < 2:
                raise Refusal(f"{where}: task.choices={self.choices} is no column of two or more answers")
            choices = tuple(map(str, listed))
        elif self.choices:
            choices = tuple(map(str, self.choices))
        if self.label:
            number = str(record.get(self.label)).removesuffix(".0")  # whole numbers of a column of floats
            if not (number.isascii() and number.isdigit() and int(number) < len(choices)):
                raise Refusal(
                    f"{where}: task.label={self.label} is {record.get(self.label)!r}; need the number of one of "
                    f"task.choices, 0 to {len(choices) - 1} (a column of texts is task.answer='{{{self.label}}}')"
                )
            answer = choices[int(number)]
        else:
            answer = filled("answer", self.answer)
        if choices and answer not in choices:
            raise Refusal(f"{where}: its answer {answer!r} is none of task.choices={', '.join(choices)}")
        if broken := [each for each in (answer, *choices) if self.separator in each]:
            raise Refusal(
                f"{where}: the answer {broken[0][:40]!r} holds task.separator={self.separator!r}, which would end it; "
                f"choose a separator that no answer holds"
            )
        if not answer.strip():
            raise Refusal(f"{where}: its answer is empty; drop it, or mend task.answer={self.answer!r}")
        query = filled("query", self.query)
        if not query.strip():
            raise Refusal(f"{where}: its query is empty; drop it, or mend task.query={self.query!r}")
        return Example(query, answer, filled("context", self.context), choices)

    def _random(self, *told: object) -> np.random.Generator:
        digest = hashlib.sha256(json.dumps([self.seed, *map(str, told)]).encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:8], "big"))

    # Reading

    def _records(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """The records of `train` or `test`, each with where it stands; none where it is not given."""
        source = getattr(self, split)
        if source is None:
            return
        label, path = f"task.{split}={source}", Path(str(source)).expanduser()
        name, _, number = str(source).partition(":")
        if name == "ciphers":
            digit, _, noisy = number.partition(":")
            if not digit.isdigit() or not int(digit) < len(ciphers.ALPHABETS) or noisy not in ciphers.KINDS:
                raise Refusal(
                    f"{label}: they go from ciphers:0 to ciphers:{len(ciphers.ALPHABETS) - 1}; :noisy or :unseen may "
                    f"follow"
                )
            yield from ((label, dict(pair)) for pair in ciphers.pairs(int(digit), noisy))
        elif path.suffix in _SUFFIXES:
            if not path.is_file():
                raise Refusal(f"{label}: no such file; give one that is there, or a hub id OWNER/NAME")
            yield from _of_file(path)
        elif "/" in str(source) and not path.exists():
            yield from _of_hub(label, name, self.name, self.revision, number or split)
        else:
            raise Refusal(f"{label}: give a {', '.join(_SUFFIXES)} file, a hub id OWNER/NAME, or ciphers:NUMBER")

    # Demonstrations

    def shown(self, example: Example, draw: int = 0) -> list[Example]:
        """The demonstrations before a query, never the query itself."""
        pool = self.demonstrations
        if self.selection == "fixed" or not self.shots:
            return pool[: self.shots]
        for tried in (min(len(pool), self.shots + 8), len(pool)):  # some may be the query itself
            if self.selection == "random":
                order = self._random(draw, example.asked).choice(len(pool), tried, replace=False)
            else:
                order = _largest(self._vectors @ _vectors([example.query])[0], tried)
            chosen = [pool[number] for number in order if pool[number].asked != example.asked][: self.shots]
            if len(chosen) == self.shots:
                return chosen[::-1]
        raise Refusal(f"task.shots={self.shots}: task.train has {len(chosen)} other queries to show")

    @cached_property
    def _vectors(self) -> np.ndarray:
        return _vectors([each.query for each in self.demonstrations])

    def told(self, example: Example, demonstrations: Sequence[Example]) -> str:
        """The teacher's prompt: a context stands where it is not the one before, as documents differ."""
        told, before = "", ""
        for each in (*demonstrations, example):
            if each.context and each.context != before:
                told, before = told + each.context + self.separator, each.context
            told += each.query + ("" if each is example else each.answer + self.separator)
        return told

    # Tokens

    def items(self, split: str, tokenizer: Any, counts: Counter[str] | None = None) -> Iterator[Item]:
        """The examples of a split in tokens; those that are left out for their length are counted in `counts`."""
        counts = Counter() if counts is None else counts
        begin = begin_token(tokenizer)

        def ids(text: str) -> list[int]:
            return [begin, *tokenizer(text, add_special_tokens=False)["input_ids"]]

        for example in self.examples(split):
            counts["queries"] += 1
            item = self._item(example, ids)
            counts["across"] += item.across
            counts["demonstrations_left_out"] += item.left_out
            longest = max([len(item.answer), *map(len, item.choices)])
            theirs = max(map(len, item.teacher_prompts)) + longest
            if len(item.prompt) + longest > self.max_length or theirs > self.teacher_max_length:
                if self.too_long == "refuse":
                    long = len(item.prompt) + longest > self.max_length
                    name, length = (
                        ("max_length", len(item.prompt) + longest) if long else ("teacher_max_length", theirs)
                    )
                    remedy = "drop" if long else "fewer or drop"
                    raise Refusal(
                        f"task.{name}={getattr(self, name)}: the query {example.query[:40]!r} takes {length} tokens; "
                        f"allow more, or set task.too_long={remedy}"
                    )
                counts["too_long"] += 1
                continue
            yield item

    def _item(self, example: Example, ids: Callable[[str], list[int]]) -> Item:
        prompt, answer, across = cut(example.query, example.answer + self.separator, ids)
        pieces = [cut(example.query, each + self.separator, ids) for each in example.choices]
        choices, across = [each[1] for each in pieces], across or any(each[2] for each in pieces)
        room = self.teacher_max_length - max([len(answer), *map(len, choices)])
        prompts, left_out = [], 0
        for draw in range(max(1, self.teacher_prompts)):
            demonstrations = self.shown(example, draw)
            teachers = ids(self.told(example, demonstrations).rstrip(" "))
            while self.too_long == "fewer" and len(teachers) > room and demonstrations:
                demonstrations, left_out = demonstrations[1:], left_out + 1
                teachers = ids(self.told(example, demonstrations).rstrip(" "))
            prompts.append(teachers)
        return Item(example, prompt, prompts, answer, choices, across, left_out)

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Dataset, dict[str, Any]]:
        if teacher_tokenizer is not None:
            raise Refusal(
                "data=task: the teacher's and the student's answers are compared token by token, so both need one "
                "tokenizer; set stages.distill.align=false and choose a student of the teacher's family"
            )
        counts: Counter[str] = Counter({"queries": 0, "too_long": 0, "across": 0, "demonstrations_left_out": 0})
        if split == "train" and self.too_long == "refuse":
            deque(self.items("test", tokenizer), maxlen=0)  # not when all is trained, and these are to be measured

        def pairs() -> Iterator[Pair]:
            for item in self.items(split, tokenizer, counts):
                size = len((item.example.answer + self.separator).encode())
                yield Pair(item.prompt, item.answer, size, item.teacher_prompts if self.teacher_prompts else [])

        draws = self.teacher_prompts
        return write_rows(
            pairs(), max_length=self.max_length, packed=self.packing, folder=folder, counts=counts, draws=draws
        )

    def questions(
        self, split: str, tokenizer: Any, limit: int, counts: Counter[str]
    ) -> list[tuple[Question, Question]]:
        """For measuring, at most `limit`: each behind the student's prompt, and behind the teacher's (its first)."""
        found = []
        for item in islice(self.items(split, tokenizer, counts), limit):
            example = item.example
            right = example.choices.index(example.answer) if item.choices else 0
            told = (example.asked, example.answer, len(item.answer), item.choices, example.choices, right)
            found.append((Question(item.prompt, *told), Question(item.teacher_prompts[0], *told)))
        return found

    def texts(self, split: str) -> Iterable[str]:
        """Queries with their answers, as the student sees them."""
        return (example.query + example.answer + self.separator for example in self.examples(split))

    def prompts(self, split: str, tokenizer: Any, prompt_tokens: int | None, tally: Counter[str]) -> Iterator[Prompt]:
        """What the teacher answers, and what the student will see of it."""
        counts: Counter[str] = Counter()
        for item in self.items(split, tokenizer, counts):
            yield Prompt(item.example.query, item.prompt, item.teacher_prompts[0])
        tally["left_out_by_task"] += counts["too_long"]
        tally.update({name: counts[name] for name in ("across", "demonstrations_left_out")})


def _columns(template: str) -> set[str]:
    try:
        return {column for _, column, _, _ in string.Formatter().parse(template) if column}
    except ValueError:  # told with the place where it is filled
        return set()


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the largest, the largest first; of equal ones the first."""
    return np.argsort(-values, kind="stable")[:count]


def _vectors(texts: list[str]) -> np.ndarray:
    """How often each text has each of its runs of three letters, hashed to 1,024 places, of length 1."""
    found = np.zeros((len(texts), 1024), dtype=np.float32)
    for number, text in enumerate(texts):
        spaced = f"  {text.lower()}  "
        for at in range(len(spaced) - 2):
            code = int.from_bytes(hashlib.blake2b(spaced[at : at + 3].encode(), digest_size=2).digest(), "big")
            found[number, code % 1024] += 1
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-9)


def _of_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.suffix == ".csv":
        csv.field_size_limit(2**30)  # a cell can be a document
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            try:
                for row in reader:
                    where = f"{path} line {reader.line_num}"
                    if None in row:
                        raise Refusal(f"{where}: it has more cells than the header; quote what holds a comma")
                    yield where, row
            except (UnicodeDecodeError, csv.Error) as error:
                raise Refusal(f"{path}: no CSV in UTF-8 ({error}); write it again") from error
    elif path.suffix == ".parquet":
        rows = chain.from_iterable(batch.to_pylist() for batch in parquet(path).iter_batches(1000))
        for number, row in enumerate(rows):
            yield f"{path} row {number}", row
    else:
        yield from objects(path)


def _of_hub(
    label: str, path: str, name: str | None, revision: str | None, split: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    from datasets import load_dataset

    try:
        rows = load_dataset(path, name=name, revision=revision, split=split)
    except Exception as error:  # the hub's client raises a dozen kinds
        raise Refusal(
            f"{label}: no such file, and the hub dataset (task.name={name}, task.revision={revision}, split {split}) "
            f"does not load: {' '.join(str(error).split())}"
        ) from error
    for number, row in enumerate(rows):
        yield f"{label} row {number}", dict(row)


def _source_key(source: Any) -> str:
    path = Path(str(source)).expanduser()
    if str(source).startswith("ciphers:"):
        return json.dumps([source, ciphers.key()])
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else str(source)
