"""Answers on their way to the artifact: judged by the filters, counted, and written as kept and dropped ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.answer_files import ANSWERS, DROPPED
from pipeline.data.answer_shards import ANSWERS_SCHEMA, AT_ONCE, DROPPED_SCHEMA, Found, in_parts
from pipeline.data.filters import Candidate, Filter


@dataclass
class Judged:
    """The answers to `prompts`, and what was counted of them while they were written."""

    found: Found
    tokenizer: Any
    filters: Mapping[str, Filter]  # each sees the answers that those before it left
    samples: int  # answers to each prompt
    tally: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, int] = field(init=False)  # answers by the filter that turned them away
    _log_probability: float = 0.0  # the sum over all tokens whose teacher gives it, and their number
    _with_log_probability: int = 0

    def __post_init__(self) -> None:
        self.dropped = dict.fromkeys(self.filters, 0)

    @property
    def metrics(self) -> dict[str, Any]:
        return {
            **{name: self.tally[name] for name in ("answers", "duplicate_answers", "empty_answers", "truncated")},
            "tokens": self.tally["tokens"],
            "dropped": self.dropped,
            "mean_log_probability": (
                self._log_probability / self._with_log_probability if self._with_log_probability else None
            ),
        }

    def write(self, folder: Path, prompts: pa.Table) -> None:
        """FOLDER/answers.parquet, and dropped.parquet where there are filters."""

        def answers() -> Iterator[dict[str, Any]]:
            for first in range(0, len(prompts), AT_ONCE):
                for prompt in prompts.slice(first, AT_ONCE).to_pylist():
                    yield from self._answers(prompt)

        with (
            pq.ParquetWriter(folder / ANSWERS, ANSWERS_SCHEMA) as kept,
            pq.ParquetWriter(folder / DROPPED, DROPPED_SCHEMA) as left_out,
        ):
            for some in in_parts(answers(), AT_ONCE):
                for writer, schema, wanted in ((kept, ANSWERS_SCHEMA, False), (left_out, DROPPED_SCHEMA, True)):
                    rows = [row for row in some if (row["dropped_by"] is not None) == wanted]
                    writer.write_table(pa.Table.from_pylist(rows, schema))
        if not self.filters:
            (folder / DROPPED).unlink()

    def _answers(self, prompt: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to a prompt as rows of DROPPED_SCHEMA, each with the first filter that turned it away."""
        made = [self.found[prompt["provenance"], sample] for sample in range(self.samples)]
        candidates = [
            Candidate(
                prompt["prompt"],
                completion_of(self.tokenizer, prompt["teacher_ids"], one["completion_ids"]),
                one["completion_ids"],
                one["log_probabilities"],
                one["finish_reason"],
            )
            for one in made
        ]
        turned_away = self._turned_away(candidates)
        self._count(candidates, turned_away)
        return [
            {
                "prompt": candidate.prompt,
                "completion": candidate.completion,
                "prompt_ids": prompt["ids"],
                "completion_ids": candidate.ids,
                "log_probabilities": candidate.log_probabilities,
                "finish_reason": candidate.finish_reason,
                "split": prompt["split"],
                "sample": sample,
                "provenance": prompt["provenance"],
                "teacher_prompt_ids": prompt["teacher_ids"],
                "dropped_by": by,
            }
            for sample, (candidate, by) in enumerate(zip(candidates, turned_away, strict=True))
        ]

    def _turned_away(self, candidates: list[Candidate]) -> list[str | None]:
        """By which filter each was."""
        found: list[str | None] = [None] * len(candidates)
        for name, each in self.filters.items():
            left = [number for number, by in enumerate(found) if by is None]
            keep = each.keep([candidates[number] for number in left])
            for number, stays in zip(left, keep, strict=True):
                if not stays:
                    found[number] = name
                    self.dropped[name] += 1
        return found

    def _count(self, candidates: list[Candidate], turned_away: list[str | None]) -> None:
        seen = set()
        for candidate, by in zip(candidates, turned_away, strict=True):
            self.tally["made"] += 1
            if by is not None:
                continue
            self.tally["answers"] += 1
            self.tally["tokens"] += len(candidate.ids)
            self.tally["empty_answers"] += not candidate.completion.strip()
            self.tally["truncated"] += candidate.finish_reason == "length"
            self.tally["duplicate_answers"] += tuple(candidate.ids) in seen
            seen.add(tuple(candidate.ids))
            if candidate.log_probabilities is not None:
                self._log_probability += sum(candidate.log_probabilities)
                self._with_log_probability += len(candidate.log_probabilities)


def completion_of(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text that the answer adds to its prompt: by themselves some tokenizers leave out a first space."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = text(prompt[-8:]), text(prompt[-8:] + ids)
    return whole[len(before) :] if whole.startswith(before) else text(ids)
