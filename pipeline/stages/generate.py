"""Let a teacher answer prompts once, so that students train on what it wrote: sequence-level distillation."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from transformers import GenerationConfig

from models import seeds
from models.errors import Refusal
from models.generation import Answer, Sampling
from models.load import DTYPES, attention_for, empty_model, load_config, parameter_count
from models.teachers.teacher import Opening, Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.answer_shards import (
    ANSWERS_SCHEMA,
    AT_ONCE,
    DROPPED_SCHEMA,
    PROMPTS_SCHEMA,
    Found,
    Shards,
    in_parts,
    write_whole,
)
from pipeline.data.answers import ANSWERS, DROPPED
from pipeline.data.batch import pad_token
from pipeline.data.conversations import tokenizer_of
from pipeline.data.filters import Candidate, Filter, code_key
from pipeline.data.source import SPLITS, DataSource, check_source, source_key
from pipeline.data.tokenizer import tokenizer_key
from pipeline.planned import teacher_config
from pipeline.progress import shown
from pipeline.shelf import Shelf
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training.ranks import join
from pipeline.training.strategy import prepare_environment

TOO_LONG = ("refuse", "drop")


@dataclass(frozen=True)
class Generate(Stage):
    """Prompts of `data`, answered by `teacher`. What is held out of training is answered apart: the column `split`."""

    makes: ClassVar[Makes] = "answers"
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size", "shard_answers"})

    data: DataSource
    teacher: Any  # a Source, or one that is recorded elsewhere: cached, served
    sampling: Sampling
    prompt_tokens: int | None = None  # of every text so many tokens are the prompt; None: all of them
    stop: list[str] | None = None  # texts that end an answer, beside the end tokens; None: of a task its separator
    filters: dict[str, Filter] = field(default_factory=dict)
    splits: list[str] = field(default_factory=lambda: list(SPLITS))
    too_long: str = "refuse"  # a prompt without room for its answer in the teacher's context; drop: left out, counted
    batch_size: int = 16  # answers made at once; memory only
    shard_answers: int = 4096  # answers; what an interrupt costs at most, or what five minutes gave

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_answers"):
            if getattr(self, name) < 1:
                raise Refusal(f"generate.{name}={getattr(self, name)}: need at least 1")
        if self.prompt_tokens is not None and self.prompt_tokens < 1:
            raise Refusal(f"generate.prompt_tokens={self.prompt_tokens}: need at least 1, or null for whole texts")
        if self.too_long not in TOO_LONG:
            raise Refusal(f"generate.too_long={self.too_long}: need one of {', '.join(TOO_LONG)}")
        if not self.splits or set(self.splits) - set(SPLITS):
            raise Refusal(f"generate.splits={self.splits}: need some of {', '.join(SPLITS)}")
        if not all(self._stop):
            raise Refusal("generate.stop holds an empty text, which would end every answer at once; leave it out")

    @property
    def _stop(self) -> list[str]:
        if self.stop is None:
            return self.data.stops
        return list(self.stop)

    def ranks(self, context: Context) -> int:
        return context.world if self.teacher.runs_here else 1

    def parents(self, context: Context) -> dict[str, str]:
        return {"teacher": self.teacher.path}

    def content(self) -> str:
        """Hash of the text it reads, and of the code that a user's own filters are."""
        return source_key(self.data) + code_key(self.filters.values())

    def check(self, context: Context) -> StagePlan:
        if self.data.made_by_stages:
            raise Refusal(
                f"stages.{context.stage}.data: answers are no prompts; give texts, conversations or a task (data=files)"
            )
        corpus = check_source(context, self.data)
        if self.prompt_tokens is not None and (corpus["chat"] or self.data.whole_prompts):
            raise Refusal(
                f"stages.{context.stage}.prompt_tokens={self.prompt_tokens} is for texts; the prompts of "
                f"{'conversations' if corpus['chat'] else 'a task'} are whole: set it to null"
            )
        if self.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={self.data.teacher_prompts}: an answer is the teacher's to one prompt; use task.draws=1, "
                f"and stages.{context.stage}.sampling.samples for several answers"
            )
        if not self.teacher.runs_here:
            self.teacher.endpoint.check()
            if self.sampling.beams > 1:
                raise Refusal(
                    f"stages.{context.stage}.sampling.beams={self.sampling.beams}: a server searches no beams; set it "
                    f"to 1, or let the teacher run here (teacher=online)"
                )
        config = teacher_config(context, self.teacher, weights=self.teacher.runs_here)
        room = self._room(config)
        if room is not None and room < (self.prompt_tokens or 0) + 1:
            raise Refusal(
                f"stages.{context.stage}.sampling.max_new_tokens={self.sampling.max_new_tokens}: the teacher reads "
                f"{config.max_position_embeddings} tokens (max_position_embeddings), which leaves {max(room, 0)} for "
                f"a prompt; set fewer"
            )
        context.plan_model(config)
        answers = f"{self.sampling.samples} answers" if self.sampling.samples > 1 else "an answer"
        return StagePlan(
            model=config.model_type,
            data=corpus,
            until=f"{answers} to every prompt",
            teacher=f"{self.teacher.path} ({parameter_count(empty_model(config)):,})",
            commits={"teacher": getattr(config, "_commit_hash", None)},
        )

    def _room(self, config: Any) -> int | None:
        """Tokens of the longest prompt that can still be answered."""
        limit = getattr(config, "max_position_embeddings", None)
        return None if limit is None else int(limit) - self.sampling.max_new_tokens

    # --- prompts: one process, before the ranks ---

    def prepare(self, context: Context) -> None:
        tokenizer = self._tokenizer()
        config = load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code)
        context.work.mkdir(parents=True, exist_ok=True)
        ends = end_tokens(self.teacher.path, tokenizer, config)
        header = self._header(context, tokenizer, ends)
        # Answers are found again by their provenance, whatever else has changed.
        shards = self._shelf(context).open(context)
        counts = self._write_prompts(context, tokenizer, header, self._room(config))
        adopted: list[str] = []
        if context.stage not in context.config["force"] and artifact.read_manifest(context.out) is not None:
            adopted = [str(path) for name in (ANSWERS, DROPPED) if (path := context.out / name).exists()]
        # Not by each rank for itself: one could already have written what another then finds.
        there = Found(shards, adopted)
        keys = dict.fromkeys(key for path in self._prompt_files(context) for key in _column(path, "provenance"))
        todo = {key: [n for n in range(self.sampling.samples) if (key, n) not in there] for key in keys}
        artifact.write_json(context.work / "todo.json", {key: samples for key, samples in todo.items() if samples})
        artifact.write_json(
            context.work / "prepared.json",
            {"counts": counts, "end_tokens": ends, "shards": str(shards), "adopted": adopted},
        )

    def _tokenizer(self) -> Any:
        return tokenizer_of(self.teacher.path, self.data, self.teacher.trust_remote_code)

    def _header(self, context: Context, tokenizer: Any, ends: list[int]) -> str:
        """Everything beside the prompt that decides an answer."""
        teacher = context.parents["teacher"]["content_hash"]
        if not self.teacher.runs_here:
            endpoint = self.teacher.endpoint  # asked for its model: what answers at an address can change
            teacher = f"served {endpoint.model or endpoint.ask().model}"
        sampling = {name: value for name, value in asdict(self.sampling).items() if name != "samples"}
        told = [teacher, tokenizer_key(tokenizer), self.teacher.dtype, sampling, self._stop, ends]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def _write_prompts(self, context: Context, tokenizer: Any, header: str, room: int | None) -> dict[str, int]:
        """work/prompts.parquet: in the order of SPLITS. Raises Refusal where prompts are too long, or none is left."""
        tally: Counter[str] = Counter()
        longest = 0
        taken: set[bytes] = set()  # what was asked
        split_of: dict[bytes, str] = {}  # of what a student reads
        # What is held out comes first: a prompt that also stands in train is not learnt from.
        for split in sorted(self.splits, key=SPLITS.index, reverse=True):

            def kept(split: str = split) -> Iterator[dict[str, Any]]:
                nonlocal longest
                for prompt in self.data.prompts(split, tokenizer, self.prompt_tokens, tally):
                    tally["found"] += 1
                    student, both = _digest(prompt.ids), _digest([prompt.ids, prompt.teacher_ids])
                    if room is not None and len(prompt.teacher_ids) > room:
                        tally["too_long"] += 1
                        longest = max(longest, len(prompt.teacher_ids))
                    elif split_of.setdefault(student, split) != split:
                        tally["held_out"] += 1
                    elif both in taken:
                        tally["duplicate_prompts"] += 1
                    else:
                        taken.add(both)
                        tally["prompts"] += 1
                        yield {
                            "split": split,
                            "provenance": provenance(header, prompt.teacher_ids),
                            "prompt": prompt.text,
                            "ids": prompt.ids,
                            "teacher_ids": prompt.teacher_ids,
                        }

            write_whole(context.work / f"prompts-{split}.parquet", PROMPTS_SCHEMA, kept())
        if tally["too_long"] and self.too_long == "refuse":
            raise Refusal(
                f"stages.{context.stage}: {tally['too_long']:,} of {tally['found']:,} prompts (the longest has "
                f"{longest:,} tokens) leave no room for sampling.max_new_tokens={self.sampling.max_new_tokens} in the "
                f"teacher's context; set too_long=drop to leave them out, fewer new tokens, or shorter prompts"
            )
        if not tally["prompts"]:
            raise Refusal(f"stages.{context.stage}: no prompt is left of {tally['found']:,} found ({dict(tally)})")
        names = ["prompts", "duplicate_prompts", "held_out", "too_long", "too_short", "without_prompt"]
        names += ["left_out_by_task", "across", "demonstrations_left_out"]
        if told := ", ".join(f"{name.replace('_', ' ')} {tally[name]:,}" for name in names[1:] if tally[name]):
            print(f"{context.stage}: of {tally['found']:,} prompts: {told}", flush=True)
        return {name: tally[name] for name in names}

    # --- answers: every rank ---

    def run(self, context: Context) -> None:
        prepared = json.loads((context.work / "prepared.json").read_text())
        tokenizer = self._tokenizer()
        prompts = pa.concat_tables(pq.read_table(path) for path in self._prompt_files(context))
        todo: dict[str, list[int]] = json.loads((context.work / "todo.json").read_text())
        shards = Shards(Path(prepared["shards"]), context.rank, self.shard_answers)
        asked: dict[str, int] = {}  # each provenance's first prompt
        for number, key in enumerate(prompts["provenance"].to_pylist()):
            asked.setdefault(key, number)
        begin, made = time.monotonic(), 0
        try:
            if self.teacher.runs_here:
                made = self._run_model(context, prompts, asked, todo, tokenizer, prepared["end_tokens"], shards)
            else:
                made = self._ask(context, prompts, asked, todo, tokenizer, prepared["end_tokens"], shards)
        finally:  # a server that stays down, or an interrupt: what has come is kept
            shards.flush()
        seconds = time.monotonic() - begin
        if context.world > 1 and self.teacher.runs_here:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        if context.rank:
            return
        self._publish(context, tokenizer, prepared, prompts, shards.folder, made / seconds if made else None)

    def _prompt_files(self, context: Context) -> list[Path]:
        return [path for split in SPLITS if (path := context.work / f"prompts-{split}.parquet").exists()]

    def _run_model(
        self,
        context: Context,
        prompts: pa.Table,
        asked: dict[str, int],
        todo: dict[str, list[int]],
        tokenizer: Any,
        ends: list[int],
        shards: Shards,
    ) -> int:
        """Tokens made by this rank."""
        prepare_environment(context.device)
        world, rank = context.world, context.rank
        place = join(context.device) if world > 1 else torch.device(context.device)
        if not todo:  # other filters, or fewer prompts: all answers are there
            return 0
        attention = attention_for("auto", context.device, DTYPES[self.teacher.dtype])
        source: Source = getattr(self.teacher, "recorder", None) or self.teacher
        teacher: Any = source.open(Opening(len(tokenizer), attention, packed=False, device=context.device))
        if isinstance(teacher, torch.nn.Module):
            teacher.to(place)
        units = self._units(prompts, asked)
        open_units = [unit for unit in units if any(key in todo for key in unit)]
        words = {"pad_token": pad_token(tokenizer), "batch_size": self.batch_size}
        made = 0
        with torch.no_grad():
            teacher.check()
            # As many batches on every rank: a sharded teacher takes all of them for every forward.
            rounds = -(-len(open_units) // world)
            for round_ in shown(range(rounds), rounds, "generating", rank == 0):
                mine = round_ * world + rank < len(open_units)
                unit = open_units[round_ * world + rank if mine else 0]
                ids = [prompts["teacher_ids"][asked[key]].as_py() for key in unit]
                answers = dict(
                    teacher.generate(ids, self.sampling, end_tokens=ends, stop=self._stop, tokenizer=tokenizer, **words)
                )
                flat = [(number, answer) for number in range(len(unit)) for answer in answers[number]]
                pairs = [(ids[number], answer.ids) for number, answer in flat]
                told = teacher.log_probabilities(pairs, vocabulary=len(tokenizer), **words)
                if not all(math.isfinite(value) for values in told for value in values):
                    raise Refusal(
                        f"{context.stage}: the teacher's log-probabilities are no numbers in {self.teacher.dtype}; set "
                        f"teacher.dtype=float32, or see to its weights"
                    )
                if mine:
                    for at, ((number, answer), log) in enumerate(zip(flat, told, strict=True)):
                        shards.add(unit[number], at % self.sampling.samples, answer, log)
                        made += len(answer.ids)
                    shards.flush_where_due()
        teacher.close()
        return made

    def _units(self, prompts: pa.Table, asked: dict[str, int]) -> list[list[str]]:
        """Prompts that are answered together, of similar length, the longest first.

        The same ones whatever is left to do and however many ranks there are, so that an interrupted run rounds as an
        uninterrupted one does.
        """
        lengths = pc.list_value_length(prompts["teacher_ids"]).to_pylist()
        order = sorted(asked, key=lambda key: (-lengths[asked[key]], asked[key]))
        size = max(1, self.batch_size // (self.sampling.samples * self.sampling.beams))
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _ask(
        self,
        context: Context,
        prompts: pa.Table,
        asked: dict[str, int],
        todo: dict[str, list[int]],
        tokenizer: Any,
        ends: list[int],
        shards: Shards,
    ) -> int:
        """Of a server; its own random numbers, from a seed of each answer's own."""
        sampling = self.sampling

        def items() -> Iterator[tuple[tuple[str, int], list[int], int]]:
            for key, samples in todo.items():
                ids = prompts["teacher_ids"][asked[key]].as_py()
                for sample in samples:
                    yield (key, sample), ids, seeds.of_answer(sampling.seed, ids, sample) % 2**31

        count, made = sum(map(len, todo.values())), 0
        told = self.teacher.endpoint.generate(
            items(),
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stop=self._stop,
        )
        for (key, sample), generation in shown(told, count, "generating"):
            reason = "length" if generation.finish_reason == "length" else "stop"
            ids = generation.ids
            text = generation.text
            stopped = reason == "stop" and bool(self._stop) and not any(stop in text for stop in self._stop)
            if ids is None:  # the server tells only text, and of a stop nothing
                ids = tokenizer(text + self._stop[0] * stopped, add_special_tokens=False)["input_ids"]
            elif stopped and (not ids or ids[-1] not in ends):
                # Most cut the stop off the text, and tell its tokens all the same.
                told_text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                if not any(stop in told_text for stop in self._stop):
                    ids = [*ids, *tokenizer(self._stop[0], add_special_tokens=False)["input_ids"]]
            if ids and not 0 <= min(ids) <= max(ids) < len(tokenizer):
                raise Refusal(
                    f"teacher.path={self.teacher.path}: the server answers with token {max(ids)}, and its tokenizer "
                    f"has {len(tokenizer)}; give the tokenizer of the model that is served"
                )
            # An answer that came to its end by itself is learnt with its end; not all servers tell that token.
            if reason == "stop" and not self._stop and ends and (not ids or ids[-1] not in ends):
                ids = [*ids, ends[0]]
            shards.add(key, sample, Answer(ids, reason), generation.log_probabilities)
            shards.flush_where_due()
            made += len(ids)
        return made

    # --- the result: rank 0 ---

    def _publish(
        self,
        context: Context,
        tokenizer: Any,
        prepared: dict[str, Any],
        prompts: pa.Table,
        shards: Path,
        speed: float | None,
    ) -> None:
        tally: Counter[str] = Counter()
        total: dict[str, float] = {"log": 0.0, "told": 0}
        dropped = dict.fromkeys(self.filters, 0)
        there = Found(shards, prepared["adopted"])

        def answers() -> Iterator[dict[str, Any]]:
            for first in range(0, len(prompts), AT_ONCE):
                for prompt in prompts.slice(first, AT_ONCE).to_pylist():
                    yield from self._judged(prompt, there, tokenizer, dropped, tally, total)

        def build(folder: Path) -> None:
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
            if not tally["answers"]:
                raise Refusal(
                    f"stages.{context.stage}.filters leave none of {tally['made']:,} answers ({dropped}); loosen them, "
                    f"the answers are kept"
                )
            tokenizer.save_pretrained(folder)
            load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).save_pretrained(folder)
            manifest["metrics"] |= {
                **prepared["counts"],
                **{name: tally[name] for name in ("answers", "duplicate_answers", "empty_answers", "truncated")},
                "tokens": tally["tokens"],
                "dropped": dropped,
                "mean_log_probability": total["log"] / total["told"] if total["told"] else None,
                "tokens_per_second": speed,  # of what this last start made, on each rank
            }
            manifest["tokens"] = tally["tokens"]

        manifest: dict[str, Any] = {**context.manifest(self.makes), "metrics": {}, "certificates": {}}
        artifact.publish(context.out, build, manifest)
        self._shelf(context).clear()
        told = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in tally.items() if name != "made")
        print(f"{context.stage}: {prepared['counts']['prompts']:,} prompts; {told}")

    def _judged(
        self,
        prompt: dict[str, Any],
        there: Found,
        tokenizer: Any,
        dropped: dict[str, int],
        tally: Counter[str],
        total: dict[str, float],
    ) -> list[dict[str, Any]]:
        """The answers to a prompt as rows, each with the first filter that turned it away."""
        made = [there[prompt["provenance"], sample] for sample in range(self.sampling.samples)]
        candidates = [
            Candidate(
                prompt["prompt"],
                _completion(tokenizer, prompt["teacher_ids"], one["completion_ids"]),
                one["completion_ids"],
                one["log_probabilities"],
                one["finish_reason"],
            )
            for one in made
        ]
        fallen: list[str | None] = [None] * len(candidates)
        for name, each in self.filters.items():
            left = [number for number, by in enumerate(fallen) if by is None]
            keep = each.keep([candidates[number] for number in left])
            for number, stays in zip(left, keep, strict=True):
                if not stays:
                    fallen[number] = name
                    dropped[name] += 1
        rows = []
        said = set()
        for sample, (candidate, by) in enumerate(zip(candidates, fallen, strict=True)):
            tally["made"] += 1
            if by is None:
                tally["answers"] += 1
                tally["tokens"] += len(candidate.ids)
                tally["empty_answers"] += not candidate.completion.strip()
                tally["truncated"] += candidate.finish_reason == "length"
                tally["duplicate_answers"] += tuple(candidate.ids) in said
                said.add(tuple(candidate.ids))
                if candidate.log_probabilities is not None:
                    total["log"] += sum(candidate.log_probabilities)
                    total["told"] += len(candidate.log_probabilities)
            rows.append(
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
            )
        return rows

    def _shelf(self, context: Context) -> Shelf:
        return Shelf(context.work.parent / "answers" / context.stage)


def provenance(header: str, teacher_ids: Sequence[int]) -> str:
    """Of an answer: what it was made of and how, but for which sample it is."""
    return hashlib.sha256(json.dumps([header, list(teacher_ids)]).encode()).hexdigest()[:32]


def end_tokens(path: str, tokenizer: Any, config: Any) -> list[int]:
    """What ends the teacher's answers: its tokenizer's end token first, and those its generation config names."""
    try:
        named = GenerationConfig.from_pretrained(path).eos_token_id
    except (OSError, ValueError):
        named = getattr(config, "eos_token_id", None)
    listed = named if isinstance(named, list) else [named]
    return list(dict.fromkeys(token for token in [tokenizer.eos_token_id, *listed] if token is not None))


def _digest(tokens: list[Any]) -> bytes:
    return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).digest()


def _completion(tokenizer: Any, prompt: list[int], ids: list[int]) -> str:
    """The text that the answer adds to its prompt: by themselves some tokenizers leave out a first space."""

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    before, whole = text(prompt[-8:]), text(prompt[-8:] + ids)
    return whole[len(before) :] if whole.startswith(before) else text(ids)


def _column(path: Path, name: str) -> list[Any]:
    values: list[Any] = pq.read_table(path, columns=[name])[name].to_pylist()
    return values
