"""A teacher's answers as training data: what the stage `generate` wrote, or any pairs of prompt and completion.

The prompt is read and the completion is learnt. Where the file holds tokens they are taken as they are: what a student
learns from is what the teacher wrote, not what its text would be tokenized to.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from models.errors import Refusal
from models.files import hash_of
from pipeline.data.answer_files import TEACHERS, columns_of, files_of, prompt_keys, read_answers, records
from pipeline.data.controls import Controls
from pipeline.data.frames import controls_of
from pipeline.data.pairs import Pair, split_pair, write_sequences
from pipeline.data.readers import parquet
from pipeline.data.source import DataSource, Prompt, check_reading, with_reading
from pipeline.data.tokenizer import FILES, begin_token, load_tokenizer, tokenizer_key, vocabulary_of
from pipeline.hashes import file_hashes

if TYPE_CHECKING:
    from pipeline.data.sequences import Sequences

TOO_LONG = ("refuse", "drop", "truncate")


@dataclass
class Answers(DataSource):
    """`train`: a folder of the stage `generate`, or a .parquet or .jsonl file, or a folder of them, with the columns
    prompt_ids and completion_ids, or prompt and completion as text.

    A column `split` says what is held out; without one it is decided by the prompt's hash (`holdout`).
    """

    train: str
    validation: str | None = None  # of its own; else what `train` holds of it
    test: str | None = None
    max_length: int = 256  # tokens of prompt and completion
    teacher_max_length: int = 1024  # of the teacher's prompt and the completion, with context
    packing: bool = False
    context: bool = False  # the teacher reads its own prompt (teacher_prompt_ids), as it did when it answered
    as_text: bool = False  # tokenize the texts anew, for a tokenizer that is not the teacher's
    control_tokens: str | None = None  # parse: what texts spell (`</s>`) is read as control tokens, not as text
    too_long: str = "refuse"  # drop: left out; truncate: the completion is shortened; both counted
    holdout: float = 0.05
    max_answers: int | None = None  # of each split, the first ones
    validation_sequences: int | None = None
    node: ClassVar[str] = "answers"

    @property
    def made_by_stages(self) -> dict[str, str]:
        given = {"answers": self.train, "validation_answers": self.validation, "test_answers": self.test}
        return {role: str(path) for role, path in given.items() if path}

    @property
    def chat_template(self) -> str | None:
        """Of the tokenizer beside the answers, by which conversations were rendered: the student's too, then."""
        path = Path(self.train).expanduser() / "chat_template.jinja"
        return str(path) if path.is_file() and not self.as_text else None

    @property
    def teacher_prompts(self) -> int:
        return int(self.context)

    def check(self, planned: bool = False) -> dict[str, Any]:
        if self.max_length < 2:
            raise Refusal(f"{self.node}.max_length={self.max_length}: need 2 tokens or more, the second is predicted")
        if self.too_long not in TOO_LONG:
            raise Refusal(f"{self.node}.too_long={self.too_long}: need one of {', '.join(TOO_LONG)}")
        if not 0 <= self.holdout < 0.5:
            raise Refusal(f"{self.node}.holdout={self.holdout}: need [0, 0.5); 0.05 holds 5 % out for each split")
        if self.context and self.as_text:
            raise Refusal(
                f"{self.node}.context=true with as_text=true: the teacher's own prompts are tokens; leave one out"
            )
        for name in ("max_answers", "validation_sequences"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise Refusal(f"{self.node}.{name}={getattr(self, name)}: need 1 or more, or null for all")
        check_reading(self)
        files = [] if planned else self._files("train")
        if not planned:
            for split in ("train", "validation", "test"):
                for path in self._files(split):
                    self._columns(path)
        readable = bool(files) and all(path.suffix == ".parquet" for path in files)
        return {
            "chat": False,
            "train": {
                "sources": [self.train],
                "bytes": sum(path.stat().st_size for path in files) if files else None,
                "documents": sum(parquet(path).metadata.num_rows for path in files) if readable else None,
            },
        }

    def holds(self, split: str) -> bool:
        own = split if getattr(self, split) else "train"
        if not Path(getattr(self, own)).expanduser().exists():  # a stage is still to make it
            return True
        for path in self._files(own):
            name = self._columns(path)[0]
            if own != "train" or any(self._split_of(row, name) == split for _, row in records(path, [name, "split"])):
                return True
        return False

    def content_key(self) -> str:
        shape = {name: value for name, value in vars(self).items() if name != "validation_sequences"}
        shape = with_reading(shape)
        content = []
        for split in ("train", "validation", "test"):
            shape.pop(split)
            files = self._files(split)
            content += [[split, path.suffix, told] for path, told in zip(files, file_hashes(files), strict=True)]
        return hash_of([content, shape])

    def sample(self, documents: int) -> Answers:
        return replace(self, max_answers=min(documents, self.max_answers or documents))

    def texts(self, split: str) -> Iterable[str]:
        raise Refusal(
            f"data.train={self.train}: no tokenizer is trained on answers; name the tokenizer that they are written in"
        )

    def prompts(self, split: str, tokenizer: Any, prompt_tokens: int | None, tally: Counter[str]) -> Iterator[Prompt]:
        raise Refusal(
            f"data.train={self.train}: answers are no prompts; give texts, conversations or a task (data=files)"
        )

    def prepare(
        self, split: str, tokenizer: Any, folder: Path, teacher_tokenizer: Any = None
    ) -> tuple[Sequences, dict[str, Any]]:
        """The answers of a split as sequences. Raises Refusal where they do not fit, or are another tokenizer's."""
        if teacher_tokenizer is not None:
            raise Refusal(
                "data=answers are the teacher's own tokens, which are not compared span by span; leave align=true out, "
                "and train on their text with objective=cross_entropy and data.as_text=true"
            )
        self._check_tokenizer(tokenizer)
        counts: dict[str, Any] = {
            "documents": 0,
            "held_out": 0,
            "empty": 0,
            "truncated": 0,
            "unsupervised": 0,
            "too_long": 0,
        }
        return write_sequences(
            self._pairs(split, tokenizer, counts, controls_of(tokenizer, self)),
            max_length=self.max_length,
            packed=self.packing,
            folder=folder,
            counts=counts,
            vocabulary=vocabulary_of(tokenizer),
            draws=self.teacher_prompts,
        )

    # --- reading ---

    def _files(self, split: str) -> list[Path]:
        return files_of(split, getattr(self, split))

    def _columns(self, path: Path) -> tuple[str, str]:
        return columns_of(path, self.as_text, self.context)

    def _check_tokenizer(self, tokenizer: Any) -> None:
        """A folder names the tokenizer its tokens are of; a bare file does not."""
        for split in ("train", "validation", "test"):
            folder = Path(getattr(self, split) or "").expanduser()
            if self.as_text or not getattr(self, split) or not any((folder / name).is_file() for name in FILES):
                continue
            if tokenizer_key(load_tokenizer(folder)) != tokenizer_key(tokenizer):
                raise Refusal(
                    f"data.{split}={folder}: its tokens are another tokenizer's; set data.as_text=true to tokenize its "
                    f"texts anew, or let this teacher answer"
                )

    def _pairs(self, split: str, tokenizer: Any, counts: dict[str, Any], controls: Controls) -> Iterator[Pair]:
        longest, dropped = 0, 0
        frames = self._frames(split)
        # What a file of its own holds out is not learnt from where train has it too.
        others = ("validation", "test") if split == "train" else ()
        held_out = {
            key for other in others if getattr(self, other) for row in self._rows(other) for key in prompt_keys(row)
        }
        for row in self._rows(split):
            if counts["documents"] == self.max_answers:
                break
            counts["documents"] += 1
            if not held_out.isdisjoint(prompt_keys(row)):
                counts["held_out"] += 1
                continue
            prompt, answer, text = self._tokens(row, tokenizer, controls, frames, f"answer {counts['documents'] - 1}")
            if not prompt or not answer:
                counts["empty"] += 1
                continue
            teachers = [list(row[TEACHERS])] if self.context else []
            room = self.max_length - len(prompt)
            if teachers:
                room = min(room, self.teacher_max_length - len(teachers[0]))
            if len(answer) > room:
                longest = max(longest, len(prompt) + len(answer))
                counts["too_long"] += 1
                if self.too_long != "truncate" or room < 1:
                    dropped += 1
                    continue
                counts["truncated"] += 1
                answer = answer[:room]
                text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            yield Pair(prompt, answer, len(text.encode(errors="replace")), teachers)
        counts.update(controls.statistics())
        if dropped and self.too_long == "refuse":
            beside = f" (teacher_max_length={self.teacher_max_length})" if self.context else ""
            raise Refusal(
                f"{self.node}.max_length={self.max_length}{beside}: {dropped:,} of {counts['documents']:,} answers are "
                f"longer with their prompts, the longest {longest:,} tokens; raise it, or set "
                f"{self.node}.too_long=drop or truncate"
            )

    def _frames(self, split: str) -> Controls | None:
        """The control tokens of the tokenizer beside the answers, by which it is known what their prompts' texts hold
        of a chat template."""
        folder = Path(getattr(self, split) or self.train).expanduser()
        beside = self.as_text and any((folder / name).is_file() for name in FILES)
        return controls_of(load_tokenizer(folder)) if beside else None

    def _tokens(
        self, row: dict[str, Any], tokenizer: Any, controls: Controls, frames: Controls | None, where: str
    ) -> tuple[list[int], list[int], str]:
        """Prompt, answer, and the answer's text."""
        if "prompt_ids" in row and not self.as_text:
            prompt, answer = list(row["prompt_ids"] or []), list(row["completion_ids"] or [])
            if (highest := max([*prompt, *answer], default=0)) >= len(tokenizer):
                raise Refusal(
                    f"data.train={self.train}: it holds token {highest}, and the tokenizer has {len(tokenizer)}; its "
                    f"tokens are another tokenizer's: set data.as_text=true, or let this teacher answer"
                )
            text = row.get("completion")
            if text is None:
                text = tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            return prompt, answer, str(text)
        begin = begin_token(tokenizer)

        def ids(text: str) -> list[int]:
            found = controls.ids_of(text)
            return found if found[:1] == [begin] else [begin, *found]  # a rendered conversation can have it

        asked, said = row["prompt"] or "", controls.quote(row["completion"] or "")
        framed = frames.spellings if frames is not None and frames.wrote(asked, row.get("prompt_ids") or []) else ()
        asked = controls.quote(asked, but=framed)
        controls.note(asked + said, where)
        prompt, answer, _ = split_pair(asked, said, ids)
        if answer and row.get("finish_reason") != "length" and tokenizer.eos_token_id is not None:
            answer = [*answer, tokenizer.eos_token_id]
        return prompt, answer, str(row["completion"] or "")

    def _rows(self, split: str) -> Iterator[dict[str, Any]]:
        own = split if getattr(self, split) else "train"
        for path in self._files(own):
            prompt = self._columns(path)[0]
            for row in read_answers(path, self.as_text, self.context):
                if own != "train" or self._split_of(row, prompt) == split:
                    yield row

    def _split_of(self, row: dict[str, Any], prompt: str) -> str:
        named = row.get("split")
        if named is not None:
            return str(named)
        digest = hashlib.sha256(json.dumps(row[prompt]).encode()).digest()
        fraction = int.from_bytes(digest[:8], "big") / 2**64
        for held_out, share in (("test", self.holdout), ("validation", 2 * self.holdout)):
            if fraction < share:
                return "train" if getattr(self, held_out) else held_out
        return "train"
