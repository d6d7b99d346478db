"""A task: queries with answers, and what a teacher is shown before a query that a student is not.

In-context distillation: the teacher reads `context`, some demonstrations and the query; the student reads the query
alone, and learns to answer as the teacher does (arXiv:2212.10670; of instructions and documents, arXiv:2209.15189).

Prompts are texts made by templates, tokenized as a whole; an answer's tokens are those that the student's prompt and
answer have beyond the prompt's own, or, where a token would reach across, the answer's by itself (`across` counts it):
so that a prompt is the same with and without its answer. Spaces at a prompt's end belong to its answer.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import Refusal
from models.questions import Question
from pipeline.data.controls import Controls
from pipeline.data.demonstrations import SELECTIONS, Demonstrations, random_of
from pipeline.data.examples import Example, Templates
from pipeline.data.frames import controls_of
from pipeline.data.pairs import Pair, split_pair, write_sequences
from pipeline.data.prepared import SPELLINGS, tell
from pipeline.data.records import records, source_key
from pipeline.data.source import DataSource, Prompt, check_reading, with_reading
from pipeline.data.tokenizer import begin_token, vocabulary_of

if TYPE_CHECKING:
    from pipeline.data.sequences import Sequences

TOO_LONG = ("refuse", "fewer", "drop")


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
    control_tokens: str | None = None  # parse: what records spell (`</s>`) is read as control tokens, as templates' are
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

    # What is known without a tokenizer

    def check(self, planned: bool = False) -> dict[str, Any]:
        for name, least in (("shots", 0), ("draws", 1), ("max_length", 2), ("teacher_max_length", 2)):
            if getattr(self, name) < least:
                raise Refusal(f"task.{name}={getattr(self, name)}: need {least} or more")
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
        check_reading(self)
        self._templates.check()
        for split in ("train", "test"):
            if getattr(self, split) is not None:
                where, record = next(self._records(split), ("", None))
                if record is None:
                    raise Refusal(f"task.{split}={getattr(self, split)}: it holds no query; give a file with some")
                self._templates.example(where, record)
        self.examples("train")  # all of it is read: a bad line is reported before a stage has run
        return {"chat": False, "train": {"sources": [str(self.train)], "bytes": None, "documents": None}}

    def holds(self, split: str) -> bool:
        return bool(self.examples(split))

    def content_key(self) -> str:
        apart = ("train", "test", "validation_sequences")
        shape = {name: value for name, value in vars(self).items() if name not in apart and not name.startswith("_")}
        shape = with_reading(shape)
        content = [None if source is None else source_key(source) for source in (self.train, self.test)]
        return hashlib.sha256(json.dumps([content, shape], sort_keys=True, default=str).encode()).hexdigest()

    def examples(self, split: str) -> list[Example]:
        """Of train, validation or test; what demonstrates is in none of them."""
        return self._splits[split]

    @property
    def demonstrations(self) -> list[Example]:
        """From which the teacher is shown: of `fixed` those that all queries get, else the training queries."""
        return self._splits["demonstrations"]

    @cached_property
    def _templates(self) -> Templates:
        return Templates(self.query, self.answer, self.context, self.label, self.choices, self.separator)

    def _records(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        return records(split, getattr(self, split), self.name, self.revision)

    @cached_property
    def _splits(self) -> dict[str, list[Example]]:
        found: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
        for split in ("train", "test"):
            for where, record in self._records(split):
                example = self._templates.example(where, record)
                found[split if split == "test" else self._split_of(example)].append(example)
        held_out = {example.asked for example in found["test"]}
        for split in ("train", "validation"):
            found[split] = [each for each in found[split] if each.asked not in held_out]
        # Files are often sorted by class: whoever takes the first ones takes some of all.
        for split, examples in found.items():
            order = random_of(self.seed, split, "order").permutation(len(examples))
            found[split] = [examples[number] for number in order]
        if not found["train"]:
            raise Refusal(f"task.train={self.train}: it holds no query to learn from")
        pool = found["train"]
        if self.selection == "fixed":
            order = random_of(self.seed, "fixed").permutation(len(pool))
            pool = [pool[number] for number in order[: self.shots]]
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

    # Demonstrations

    def shown(self, example: Example, draw: int = 0) -> list[Example]:
        """The demonstrations before a query, never the query itself."""
        return self._shown.before(example, draw)

    @cached_property
    def _shown(self) -> Demonstrations:
        return Demonstrations(self.demonstrations, self.shots, self.selection, self.seed)

    def teachers_text(self, example: Example, demonstrations: Sequence[Example]) -> str:
        """The teacher's prompt: a context stands where it is not the one before, as documents differ."""
        text, before = "", ""
        for each in (*demonstrations, example):
            if each.context and each.context != before:
                text, before = text + each.context + self.separator, each.context
            text += each.query + ("" if each is example else each.answer + self.separator)
        return text

    # Tokens

    def items(
        self, split: str, tokenizer: Any, counts: Counter[str] | None = None, controls: Controls | None = None
    ) -> Iterator[Item]:
        """The examples of a split in tokens; those that are left out for their length are counted in `counts`, and in
        `controls` the control tokens that they spell."""
        counts = Counter() if counts is None else counts
        controls = controls or controls_of(tokenizer, self)
        begin = begin_token(tokenizer)

        def ids(text: str) -> list[int]:
            return [begin, *controls.ids_of(text)]

        for number, example in enumerate(self.examples(split)):
            counts["queries"] += 1
            item = self._item(example, ids, controls, f"query {number}")
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

    def _item(self, asked: Example, ids: Callable[[str], list[int]], controls: Controls, where: str) -> Item:
        example = _read(asked, controls)
        controls.note(example.context + example.query + example.answer, where)
        prompt, answer, across = split_pair(example.query, example.answer + self.separator, ids)
        pieces = [split_pair(example.query, each + self.separator, ids) for each in example.choices]
        choices, across = [each[1] for each in pieces], across or any(each[2] for each in pieces)
        room = self.teacher_max_length - max([len(answer), *map(len, choices)])
        prompts, left_out = [], 0
        for draw in range(max(1, self.teacher_prompts)):
            demonstrations = [_read(each, controls) for each in self.shown(asked, draw)]
            teachers = ids(self.teachers_text(example, demonstrations).rstrip(" "))
            while self.too_long == "fewer" and len(teachers) > room and demonstrations:
                demonstrations, left_out = demonstrations[1:], left_out + 1
                teachers = ids(self.teachers_text(example, demonstrations).rstrip(" "))
            prompts.append(teachers)
        return Item(asked, prompt, prompts, answer, choices, across, left_out)

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Sequences, dict[str, Any]]:
        if teacher_tokenizer is not None:
            raise Refusal(
                "data=task: the teacher's and the student's answers are compared token by token, so both need one "
                "tokenizer; set align=false on the stage that trains, and choose a student of the teacher's family"
            )
        counts: Counter[str] = Counter({"queries": 0, "too_long": 0, "across": 0, "demonstrations_left_out": 0})
        if split == "train" and self.too_long == "refuse":
            deque(self.items("test", tokenizer), maxlen=0)  # not when all is trained, and these are to be measured

        controls = controls_of(tokenizer, self)
        counted: dict[str, Any] = {}  # whole when all are read

        def pairs() -> Iterator[Pair]:
            for item in self.items(split, tokenizer, counts, controls):
                size = len((item.example.answer + self.separator).encode())
                yield Pair(item.prompt, item.answer, size, item.teacher_prompts if self.teacher_prompts else [])
            counted.update({**counts, **controls.statistics()})

        draws = self.teacher_prompts
        return write_sequences(
            pairs(),
            max_length=self.max_length,
            packed=self.packing,
            folder=folder,
            counts=counted,
            vocabulary=vocabulary_of(tokenizer),
            draws=draws,
        )

    def questions(
        self, split: str, tokenizer: Any, limit: int, counts: Counter[str]
    ) -> list[tuple[Question, Question]]:
        """For measuring, at most `limit`: each behind the student's prompt, and behind the teacher's (its first)."""
        found = []
        for item in islice(self.items(split, tokenizer, counts), limit):
            example = item.example
            right = example.choices.index(example.answer) if item.choices else 0
            known = (example.asked, example.answer, len(item.answer), item.choices, example.choices, right)
            found.append((Question(item.prompt, *known), Question(item.teacher_prompts[0], *known)))
        return found

    def sample(self, documents: int) -> Task:
        return replace(self, max_queries=min(documents, self.max_queries or documents))

    def texts(self, split: str) -> Iterable[str]:
        """Queries with their answers, as the student sees them."""
        return (example.query + example.answer + self.separator for example in self.examples(split))

    def prompts(self, split: str, tokenizer: Any, prompt_tokens: int | None, tally: Counter[str]) -> Iterator[Prompt]:
        """What the teacher answers, and what the student will see of it."""
        counts: Counter[str] = Counter()
        controls = controls_of(tokenizer, self)
        for item in self.items(split, tokenizer, counts, controls):
            yield Prompt(item.example.query, item.prompt, item.teacher_prompts[0])
        tally["left_out_by_task"] += counts["too_long"]
        tally.update({name: counts[name] for name in ("across", "demonstrations_left_out")})
        tally[SPELLINGS] += controls.count
        tell(self, controls.statistics())


def _read(example: Example, controls: Controls) -> Example:
    """The example with what its record spells quoted (pipeline/data/controls.py)."""
    spells = any(map(controls.pattern.search, (example.query, example.answer, example.context, *example.choices)))
    return example.quoted(controls.quote) if spells else example
