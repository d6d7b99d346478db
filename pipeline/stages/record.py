"""Write a teacher's signal to disk once, so that students train without it."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from models.errors import Refusal
from models.heads import logit_numbers
from models.load import empty_model, load_config, parameter_count
from models.teachers.cache import Cache, Header, read_header, write_header, write_index
from models.teachers.encodings.encoding import Encoding, describe
from models.teachers.teacher import Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.prepared import sequences_of
from pipeline.data.rendering import tokenizer_of
from pipeline.data.sequences import Sequences
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.tokenizer import load_tokenizer, tokenizer_key
from pipeline.forecast.workload import BYTES_OF_TEXT_A_TOKEN, Reads
from pipeline.planned import architecture_of, teacher_config, text_bytes
from pipeline.run_folder import SIGNALS
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.steps.recording import Recording, adopt, fits, outstanding
from pipeline.steps.serving import check_server
from pipeline.steps.shelf import Shelf, link
from pipeline.training.settings import check_length, check_packing

PROVED = "server.json"  # what this attempt knows of the server


@dataclass(frozen=True)
class Record(Stage):
    makes: ClassVar[Makes] = "signal"
    on_demand: ClassVar[str] = "teacher=cached or teacher=served, without another teacher.cache"
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size", "shard_mb", "sample_tokens"})
    shareable: ClassVar[bool] = True

    data: DataSource
    teacher: Source  # one that needs a record: cached, served
    encoding: Encoding
    batch_size: int = 8  # sequences that the teacher reads at once; memory only
    shard_mb: int = 256  # of one file; an interrupted run repeats as much at most, or five minutes' work
    sample_tokens: int = 512  # on which the encoding is measured against the dense teacher

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_mb", "sample_tokens"):
            if getattr(self, name) < 1:
                raise Refusal(f"record.{name}={getattr(self, name)}: need at least 1")

    @property
    def _encoding(self) -> Encoding:
        server = self.teacher.server
        return self.encoding if server is None else self.encoding.of_server(server.top_k)

    def ranks(self, context: Context) -> int:
        return context.world if self.teacher.runs_here else 1

    def parents(self, context: Context) -> dict[str, str]:
        return {"teacher": self.teacher.path, **self.data.made_by_stages}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        if not self.teacher.needs_record:
            raise Refusal(f"{context.stage} records for teacher=cached or teacher=served; there is nothing to record")
        if self.teacher.server is not None:
            self.teacher.server.check()
        encoding = describe(self._encoding)
        if self.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={self.data.teacher_prompts}: the mean of several prompts' distributions is not recorded; "
                f"use task.draws=1, or teacher=online or sharded"
            )
        config = teacher_config(context, self.teacher, weights=self.teacher.runs_here, runs=self.teacher.runs_here)
        check_length(config, self.data, "teacher")
        if self.teacher.runs_here:
            check_packing(config, self.data, "teacher")
        planned = Header(encoding, config.vocab_size, "", "", None, self.teacher.dtype)
        config.save_pretrained(self._planned(context))
        write_header(self._planned(context), planned)
        return StagePlan(
            model=config.model_type,
            data=corpus,
            until="one pass over the training text",
            warnings=check_server(context, self.teacher, scores=True),
            teacher=f"{self.teacher.path} ({parameter_count(empty_model(config)):,})",
            commits={"teacher": getattr(config, "_commit_hash", None)},
        )

    def workload(self, context: Context) -> Reads | None:
        given, trusted = self.teacher, self.teacher.trust_remote_code
        config = architecture_of(context, given.path, "teacher", setting="teacher.path", trust_remote_code=trusted)
        if not given.runs_here:
            return None
        size = text_bytes(context, self.data)
        return Reads(
            model=config,
            dtype=given.dtype,
            rows=self.batch_size,
            length=self.data.max_length,
            tokens=None if size is None else size // BYTES_OF_TEXT_A_TOKEN,
            sharded=hasattr(given.asked_once(), "offload"),
        )

    def _planned(self, context: Context) -> Path:
        assert context.plans is not None
        folder = context.plans / context.stage
        folder.mkdir(exist_ok=True)
        return folder

    def prepare(self, context: Context) -> None:
        """The packed sequences, and which of them are still to be recorded; one process, before the ranks."""
        tokenizer = tokenizer_of(self.teacher.path, self.data, self.teacher.trust_remote_code)
        context.work.mkdir(parents=True, exist_ok=True)
        sequences, statistics, folder = sequences_of(self.data, "train", tokenizer, context.data_folder)
        sequences = sequences.teacher_side()
        if not len(sequences):
            raise Refusal(f"{context.stage}: no sequence of data.train is left after tokenizing ({statistics})")
        header = self._header(context, tokenizer)
        shards = self._shelf(context).open(context, header.fingerprint.hex()[:16])
        write_header(shards, header)
        if context.stage not in context.config["force"]:
            adopt(context.out, shards, header)
        taken = [made for made in context.shares() if fits(made.folder, header)]
        for made in taken:
            adopt(made.folder, shards, header, others=True)
        left = outstanding(sequences, header, shards, context.share)
        artifact.write_json(
            context.work / "prepared.json",
            {
                "sequences": str(folder),
                "shards": str(shards),
                "todo": left.sequences,
                "pieces": left.pieces,
                "tokens": left.tokens,
                "statistics": statistics,
                "taken": [
                    {"seconds": made.manifest["seconds"], "server": made.manifest["metrics"].get("server")}
                    for made in taken
                    if made.manifest is not None
                ],
            },
        )

    def run(self, context: Context) -> None:
        prepared = json.loads((context.work / "prepared.json").read_text())
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        sequences = Sequences(prepared["sequences"]).teacher_side()
        shards = Path(prepared["shards"])
        header = read_header(shards)
        begin = time.monotonic()
        measured: dict[str, Any] = {}
        recording = Recording(
            self.teacher,
            self._encoding,
            sequences,
            prepared["todo"],
            tokenizer,
            header,
            shards,
            self.shard_mb * 2**20,
        )
        if self.teacher.server is None:
            measured = recording.from_model(context, self.data.packing, self.batch_size, self.sample_tokens)
        else:
            proved = recording.prove(self.teacher.server, context, self.sample_tokens)
            if proved is not None:
                artifact.write_json(context.work / PROVED, proved)
            recording.from_server(self.teacher.server)
        if context.rank:
            return
        self._publish(context, tokenizer, prepared, header, shards, measured, time.monotonic() - begin)

    def _header(self, context: Context, tokenizer: Any) -> Header:
        template = getattr(tokenizer, "chat_template", None)
        return Header(
            describe(self._encoding),
            len(tokenizer),
            self.teacher.key(context.parents["teacher"]["content_hash"]),
            tokenizer_key(tokenizer),
            None if template is None else hashlib.sha256(str(template).encode()).hexdigest(),
            self.teacher.dtype,
            self._head_numbers(context) if self._encoding.keeps_head else {},
        )

    def _head_numbers(self, context: Context) -> dict[str, Any]:
        config = load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code)
        scale, softcap = logit_numbers(config)
        return {"scale": scale, "softcap": softcap}

    def _publish(
        self,
        context: Context,
        tokenizer: Any,
        prepared: dict[str, Any],
        header: Header,
        shards: Path,
        measured: dict[str, Any],
        seconds: float,
    ) -> None:
        def build(folder: Path) -> None:
            for path in sorted(shards.iterdir()):
                if not path.name.startswith("."):
                    link(path, folder / path.name)
            write_index(folder)
            tokenizer.save_pretrained(folder)
            load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).save_pretrained(folder)

        stored = sum(path.stat().st_size for path in shards.glob("shard-*.safetensors"))
        stored *= prepared["pieces"] / max(1, len(Cache(shards, header)))  # adopted shards may hold other text as well
        print(f"{context.stage}: {prepared['tokens']:,} tokens, {stored / max(1, prepared['tokens']):.1f} bytes each")
        artifact.publish(
            context.out,
            build,
            {
                **context.manifest(self.makes),
                "tokens": prepared["tokens"],
                "seconds": round(seconds + sum(each["seconds"] for each in prepared["taken"]), 3),
                "metrics": {
                    **self._of_server(context, prepared["taken"]),
                    "encoding": header.encoding,
                    "pieces": prepared["pieces"],
                    "bytes_per_token": stored / max(1, prepared["tokens"]),
                    "fidelity": measured or None,  # by temperature; a server gives no dense truth to measure against
                    "data": prepared["statistics"],
                },
                "certificates": {},
            },
        )
        self._shelf(context).clear()

    def _of_server(self, context: Context, taken: list[dict[str, Any]]) -> dict[str, Any]:
        """What was proved of the server that was asked last; where other jobs have asked for all, of one of theirs."""
        if self.teacher.server is None:
            return {}
        proved = context.work / PROVED
        if proved.exists():
            return {"server": json.loads(proved.read_text())}
        return {"server": next(filter(None, (each["server"] for each in taken)), None)}

    def _shelf(self, context: Context) -> Shelf:
        return Shelf(context.work.parent / SIGNALS / context.stage)
