"""Let a teacher answer prompts once, so that students train on what it wrote: sequence-level distillation."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from models.errors import Refusal
from models.files import hash_of
from models.generation import Sampling
from models.load import empty_model, load_config, parameter_count
from models.teachers.teacher import Source
from pipeline import artifact, run_folder
from pipeline.context import Context
from pipeline.data.answer_shards import Found, Shards, answers_in
from pipeline.data.filters import Filter, code_key
from pipeline.data.rendering import tokenizer_of
from pipeline.data.source import SPLITS, DataSource, check_source, source_key
from pipeline.data.tokenizer import tokenizer_key
from pipeline.forecast.workload import Writes
from pipeline.generation.judged import Judged
from pipeline.generation.model import answered_here, units_of
from pipeline.generation.prompts import Chosen, keys_of, read_prompts, write_prompts
from pipeline.generation.request import Request, end_tokens
from pipeline.generation.server import answered_by_server
from pipeline.planned import architecture_of, teacher_config
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.serving import check_server
from pipeline.steps.shelf import Shelf
from pipeline.training.ranks import leave

TOO_LONG = ("refuse", "drop")


@dataclass(frozen=True)
class Generate(Stage):
    """Prompts of `data`, answered by `teacher`. What is held out of training is answered apart: the column `split`."""

    makes: ClassVar[Makes] = "answers"
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size", "shard_answers"})
    shareable: ClassVar[bool] = True

    data: DataSource
    teacher: Source
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
        self._check_prompts(context, chat=bool(corpus["chat"]))
        if self.teacher.server is not None:
            self.teacher.server.check()
            if self.sampling.beams > 1:
                raise Refusal(
                    f"stages.{context.stage}.sampling.beams={self.sampling.beams}: a server searches no beams; set it "
                    f"to 1, or let the teacher run here (teacher=online)"
                )
        config = teacher_config(context, self.teacher, weights=self.teacher.runs_here, runs=self.teacher.runs_here)
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
            warnings=check_server(context, self.teacher, scores=False),
            teacher=f"{self.teacher.path} ({parameter_count(empty_model(config)):,})",
            commits={"teacher": getattr(config, "_commit_hash", None)},
        )

    def workload(self, context: Context) -> Writes | None:
        given, trusted = self.teacher, self.teacher.trust_remote_code
        config = architecture_of(context, given.path, "teacher", setting="teacher.path", trust_remote_code=trusted)
        context.plan_model(config)
        if not given.runs_here:
            return None
        longest = self.data.max_length if self.prompt_tokens is None else self.prompt_tokens
        room = self._room(config)
        return Writes(
            model=config,
            dtype=given.dtype,
            rows=self.batch_size,
            prompt=longest if room is None else max(1, min(longest, room)),
            new=self.sampling.max_new_tokens,
            answers=None,
            sharded=hasattr(given.asked_once(), "offload"),
        )

    def _check_prompts(self, context: Context, chat: bool) -> None:
        if self.prompt_tokens is not None and (chat or self.data.whole_prompts):
            raise Refusal(
                f"stages.{context.stage}.prompt_tokens={self.prompt_tokens} is for texts; the prompts of "
                f"{'conversations' if chat else 'a task'} are whole: set it to null"
            )
        if self.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={self.data.teacher_prompts}: an answer is the teacher's to one prompt; use task.draws=1, "
                f"and stages.{context.stage}.sampling.samples for several answers"
            )

    def _room(self, config: Any) -> int | None:
        """Tokens of the longest prompt that can still be answered."""
        limit = getattr(config, "max_position_embeddings", None)
        return None if limit is None else int(limit) - self.sampling.max_new_tokens

    def prepare(self, context: Context) -> None:
        tokenizer = self._tokenizer()
        config = load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code)
        context.work.mkdir(parents=True, exist_ok=True)
        ends = end_tokens(self.teacher.path, tokenizer, config)
        header = self._header(context, tokenizer, ends)
        # Answers are found again by their provenance, whatever else has changed.
        shards = self._shelf(context).open(context)
        counts = self._write_prompts(context, tokenizer, header, self._room(config))
        earlier = [made.folder for made in context.shares()]
        if context.stage not in context.config["force"] and artifact.read_manifest(context.out) is not None:
            earlier.append(context.out)
        adopted = [str(path) for old in earlier for path in answers_in(old)]
        # Not by each rank for itself: one could already have written what another then finds.
        there = Found(shards, adopted)
        keys = keys_of(context.work) if context.share is None else self._shared_out(context)
        todo = {key: [n for n in range(self.sampling.samples) if (key, n) not in there] for key in keys}
        artifact.write_json(context.work / "todo.json", {key: samples for key, samples in todo.items() if samples})
        artifact.write_json(
            context.work / "prepared.json",
            {"counts": counts, "end_tokens": ends, "shards": str(shards), "adopted": adopted},
        )

    def _shared_out(self, context: Context) -> list[str]:
        """The provenances of the prompts that are this job's: of each n units that are answered together one."""
        assert context.share is not None
        number, jobs = context.share
        units = units_of(read_prompts(context.work), self.sampling, self.batch_size)
        return [key for unit in units[number - 1 :: jobs] for key in unit]

    def _tokenizer(self) -> Any:
        return tokenizer_of(self.teacher.path, self.data, self.teacher.trust_remote_code)

    def _header(self, context: Context, tokenizer: Any, ends: list[int]) -> str:
        """Everything beside the prompt that decides an answer."""
        teacher = self.teacher.key(context.parents["teacher"]["content_hash"])
        sampling = {name: value for name, value in asdict(self.sampling).items() if name != "samples"}
        decisive = [teacher, tokenizer_key(tokenizer), self.teacher.dtype, sampling, self._stop, ends]
        return hash_of(decisive)

    def _write_prompts(self, context: Context, tokenizer: Any, header: str, room: int | None) -> dict[str, int]:
        """What was counted. Raises Refusal where prompts are too long, or none is left."""
        chosen = Chosen(header, room)
        write_prompts(
            context.work,
            self.splits,
            lambda split, tally: self.data.prompts(split, tokenizer, self.prompt_tokens, tally),
            chosen,
        )
        tally = chosen.tally
        if tally["too_long"] and self.too_long == "refuse":
            raise Refusal(
                f"stages.{context.stage}: {tally['too_long']:,} of {tally['found']:,} prompts (the longest has "
                f"{chosen.longest:,} tokens) leave no room for sampling.max_new_tokens={self.sampling.max_new_tokens} "
                f"in the teacher's context; set too_long=drop to leave them out, fewer new tokens, or shorter prompts"
            )
        if not tally["prompts"]:
            raise Refusal(f"stages.{context.stage}: no prompt is left of {tally['found']:,} found ({dict(tally)})")
        if left_out := chosen.summary():
            print(f"{context.stage}: of {tally['found']:,} prompts: {left_out}", flush=True)
        return chosen.counts

    def run(self, context: Context) -> None:
        prepared = json.loads((context.work / "prepared.json").read_text())
        request = Request(
            prompts=read_prompts(context.work),
            todo=json.loads((context.work / "todo.json").read_text()),
            tokenizer=self._tokenizer(),
            sampling=self.sampling,
            stop=self._stop,
            end_tokens=prepared["end_tokens"],
            shards=Shards(Path(prepared["shards"]), context.rank, self.shard_answers),
        )
        begin, made = time.monotonic(), 0
        try:
            if self.teacher.server is None:
                made = answered_here(context, self.teacher, request, self.batch_size)
            else:
                made = answered_by_server(self.teacher.server, self.teacher.path, request)
        finally:  # a server that stays down, or an interrupt: what has come is kept
            request.shards.flush()
        seconds = time.monotonic() - begin
        if context.world > 1 and self.teacher.runs_here:
            leave(context)
        if context.rank == 0:
            self._publish(context, request, prepared, made / seconds if made else None)

    def _publish(self, context: Context, request: Request, prepared: dict[str, Any], speed: float | None) -> None:
        found = Found(request.shards.folder, prepared["adopted"])
        filters, prompts = self.filters, request.prompts
        if context.share is not None:  # the stage itself judges, over all answers
            filters = {}
            prompts = prompts.filter(pc.is_in(prompts["provenance"], pa.array(self._shared_out(context), pa.string())))
        judged = Judged(found, request.tokenizer, filters, self.sampling.samples)

        def build(folder: Path) -> None:
            judged.write(folder, prompts)
            if context.share is None and not judged.tally["answers"]:
                raise Refusal(
                    f"stages.{context.stage}.filters leave none of {judged.tally['made']:,} answers "
                    f"({judged.dropped}); loosen them, the answers are kept"
                )
            request.tokenizer.save_pretrained(folder)
            load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).save_pretrained(folder)
            # the speed is of what this last start made, on each rank
            manifest["metrics"] |= {**prepared["counts"], **judged.metrics, "tokens_per_second": speed}
            manifest["tokens"] = judged.tally["tokens"]

        manifest: dict[str, Any] = {**context.manifest(self.makes), "metrics": {}, "certificates": {}}
        artifact.publish(context.out, build, manifest)
        self._shelf(context).clear()
        counts = ", ".join(
            f"{count:,} {name.replace('_', ' ')}" for name, count in judged.tally.items() if name != "made"
        )
        print(f"{context.stage}: {len(prompts):,} prompts; {counts}")

    def _shelf(self, context: Context) -> Shelf:
        return Shelf(context.work.parent / run_folder.ANSWERS / context.stage)
