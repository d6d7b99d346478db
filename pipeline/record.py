"""Write a teacher's signal to disk once, so that students train without it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from models.cache import Cache, Header, Piece, Writer, pieces_of, save_head, seed_of, write_header
from models.encodings.encoding import Encoding, Payload, describe
from models.encodings.fidelity import fidelity
from models.encodings.top_k import TopK
from models.errors import Refusal
from models.heads import logit_numbers
from models.load import DTYPES, attention_for, check_folder, empty_model, load_config, parameter_count
from models.objectives.head import Head
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal
from models.teachers.teacher import Opening, Source
from pipeline import artifact, fit
from pipeline.context import Context
from pipeline.data import corpora, packing
from pipeline.data.batch import collate, pad_token
from pipeline.data.rows import rows_of
from pipeline.data.tokenizer import load_tokenizer, tokenizer_key
from pipeline.strategy import prepare_environment

_FLUSH_SECONDS = 300.0


@dataclass(frozen=True)
class Record:
    data: corpora.Data
    teacher: Any  # a Source that needs a record: cached, served
    encoding: Encoding
    batch_rows: int = 8  # rows the teacher reads at once; memory only
    shard_mb: int = 256  # of one file; what an interrupted run has to do again, at most
    sample_tokens: int = 512  # on which the encoding is measured against the dense teacher

    def __post_init__(self) -> None:
        for name in ("batch_rows", "shard_mb", "sample_tokens"):
            if getattr(self, name) < 1:
                raise Refusal(f"record.{name}={getattr(self, name)}: need at least 1")

    @property
    def _encoding(self) -> Encoding:
        """A server gives a top-k at temperature 1, whatever is asked."""
        if self.teacher.runs_here:
            return self.encoding
        dtype = self.encoding.dtype if isinstance(self.encoding, TopK) else "float16"
        return TopK(self.teacher.endpoint.top_k, [1.0], dtype)

    def ranks(self, context: Context) -> int:
        return context.world if self.teacher.runs_here else 1

    def parents(self, context: Context) -> dict[str, str]:
        return {"teacher": self.teacher.path}

    def content(self) -> str:
        """Hash of the text it reads."""
        return corpora.content_key(self.data)

    def check(self, context: Context) -> dict[str, Any]:
        corpus = corpora.check(self.data)
        if not getattr(self.teacher, "needs_record", False):
            raise Refusal(f"{context.stage} records for teacher=cached or teacher=served; there is nothing to record")
        if not self.teacher.runs_here:
            self.teacher.endpoint.check()
        made_here = context.produced_by(self.teacher.path)
        if not made_here:
            check_folder(self.teacher.path, "teacher", weights=self.teacher.runs_here)
        elif context.config_folder(self.teacher.path) == self.teacher.path and not context.finished(self.teacher.path):
            raise Refusal(f"{context.stage} needs the stage {made_here}, which has not been run; add it to stages")
        folder = context.config_folder(self.teacher.path)
        config = load_config(folder, "teacher", self.teacher.trust_remote_code)
        fit.check_length(config, self.data, "teacher")
        planned = Header(describe(self._encoding), config.vocab_size, "", "", None, self.teacher.dtype)
        config.save_pretrained(self._planned(context))
        write_header(self._planned(context), planned)
        return {
            "model": config.model_type,
            "data": corpus,
            "length": "one pass over the training text",
            "teacher": f"{self.teacher.path} ({parameter_count(empty_model(config)):,})",
            "commits": {"teacher": getattr(config, "_commit_hash", None)},
        }

    def _planned(self, context: Context) -> Path:
        assert context.plans is not None
        folder = context.plans / context.stage
        folder.mkdir(exist_ok=True)
        return folder

    def prepare(self, context: Context) -> None:
        """Rows, and which of them are still to be read; one process, before the ranks."""
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        context.work.mkdir(parents=True, exist_ok=True)
        rows, statistics, folder = rows_of(self.data, "train", tokenizer, context.data_folder)
        shards = context.work / "shards"
        shards.mkdir(exist_ok=True)
        header = self._header(context, tokenizer)
        write_header(shards, header)
        there = Cache(shards, header)
        todo: list[int] = []
        seen, tokens = set[bytes](), 0
        for at in range(0, len(rows), 1000):
            numbers = range(at, min(at + 1000, len(rows)))
            columns = rows[list(numbers)]
            for place, number in enumerate(numbers):
                row = {name: np.asarray([columns[name][place]]) for name in ("input_ids", "position_ids", "targets")}
                found = [p for p in pieces_of(row, header.fingerprint) if p.key not in seen]
                seen.update(piece.key for piece in found)
                tokens += sum(len(piece.supervised) for piece in found)
                if any(piece.key not in there for piece in found):
                    todo.append(number)
        artifact.write_json(
            context.work / "prepared.json",
            {"rows": str(folder), "todo": todo, "pieces": len(seen), "tokens": tokens, "statistics": statistics},
        )

    def run(self, context: Context) -> None:
        from datasets import load_from_disk

        prepared = json.loads((context.work / "prepared.json").read_text())
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        rows = load_from_disk(prepared["rows"])
        shards = context.work / "shards"
        header = self._header(context, tokenizer)
        begin = time.monotonic()
        measured: dict[str, Any] = {}
        if self.teacher.runs_here:
            measured = self._run_model(context, rows, prepared["todo"], tokenizer, header, shards)
        else:
            self._ask(rows, prepared["todo"], tokenizer, header, shards)
        if context.rank:
            return
        self._publish(context, tokenizer, prepared, header, shards, measured, time.monotonic() - begin)

    def _run_model(
        self, context: Context, rows: Any, todo: list[int], tokenizer: Any, header: Header, shards: Path
    ) -> dict[str, Any]:
        prepare_environment(context.device)
        world, rank = context.world, context.rank
        place = _join(context.device) if world > 1 else torch.device(context.device)
        attention = attention_for("auto", context.device, DTYPES[self.teacher.dtype])
        source: Source = self.teacher.recorder
        teacher: Any = source.open(Opening(header.vocabulary, attention, self.data.packing))
        if isinstance(teacher, torch.nn.Module):
            teacher.to(place)
        known, measured = Known(shards, header), {}
        writer = Writer(shards, rank, self.shard_mb * 2**20)

        def encode(batch: dict[str, Any], signal: Signal) -> None:
            hidden, head = _dense(signal, header)
            for piece in known.new(pieces_of(batch, header.fingerprint)):
                writer.add(piece.key, self._encoding.encode(_states(hidden, piece), head, seed_of(piece.key)))

        def measure(batch: dict[str, Any], signal: Signal) -> None:
            hidden, head = _dense(signal, header)
            if rank == 0:
                measured.update(self._measure(pieces_of(batch, header.fingerprint), hidden, head))
                if self._encoding.keeps_head:
                    save_head(shards, head)

        with torch.no_grad():
            teacher.check()
            mine = todo[rank::world]
            # As many batches on every rank: a sharded teacher takes all of them for every forward.
            for number in _shown(-(-len(todo) // (self.batch_rows * world)), rank == 0):
                numbers = mine[number * self.batch_rows : (number + 1) * self.batch_rows]
                batch = _batch(rows, numbers or [0], tokenizer, place)
                teacher.give(teacher.look(batch, Wanted()), partial(encode if numbers else _nothing, batch))
                writer.flush_after(_FLUSH_SECONDS)
            writer.flush()
            batch = _batch(rows, list(range(min(self.batch_rows, len(rows)))), tokenizer, place)
            teacher.give(teacher.look(batch, Wanted()), partial(measure, batch))
        teacher.close()
        if world > 1:
            torch.distributed.barrier()
            torch.distributed.destroy_process_group()
        return measured

    def _measure(self, pieces: list[Piece], hidden: Tensor, head: Head) -> dict[str, Any]:
        """The encoding against the dense teacher, on the first tokens of the text."""
        chosen: list[Piece] = []
        count = 0
        for piece in pieces:
            if not chosen or count + len(piece.supervised) <= self.sample_tokens:
                chosen.append(piece)
                count += len(piece.supervised)
        payloads = [self._encoding.encode(_states(hidden, piece), head, seed_of(piece.key)) for piece in chosen]
        payload = {name: torch.cat([each[name] for each in payloads]) for name in payloads[0]}
        states_NH = torch.cat([_states(hidden, piece) for piece in chosen])
        temperature = getattr(self._encoding, "temperature", 1.0)
        return fidelity(self._encoding, payload, states_NH, head, temperature)

    def _ask(self, rows: Any, todo: list[int], tokenizer: Any, header: Header, shards: Path) -> None:
        """Of a server, what it says after every token of every new piece."""
        known, writer = Known(shards, header), Writer(shards, 0, self.shard_mb * 2**20)

        def pieces() -> Iterator[tuple[tuple[bytes, Any], list[int]]]:
            for number in _shown(len(todo), True):
                batch = _batch(rows, [todo[number]], tokenizer, torch.device("cpu"))
                for piece in known.new(pieces_of(batch, header.fingerprint)):
                    ids = batch["input_ids"][piece.row, piece.start : piece.stop].tolist()
                    yield (piece.key, piece.supervised - piece.start), ids

        try:
            for (key, supervised), ids_TK, log_TK in self.teacher.endpoint.score(pieces()):
                writer.add(key, self._served(ids_TK[supervised], log_TK[supervised], header.vocabulary))
                writer.flush_after(_FLUSH_SECONDS)
        finally:  # a server that stays down, or an interrupt: what has come is kept
            writer.flush()

    def _served(self, ids_NK: Any, log_NK: Any, vocabulary: int) -> Payload:
        if ids_NK.size and ids_NK.max() >= vocabulary:
            raise Refusal(
                f"teacher.path={self.teacher.path}: the server names token {ids_NK.max()}, and the tokenizer has "
                f"{vocabulary}; give the tokenizer of the model that is served"
            )
        log_NK = torch.from_numpy(np.where(ids_NK < 0, -np.inf, log_NK)).double()
        ids_NK = torch.from_numpy(np.maximum(ids_NK, 0))
        encoding = self._encoding
        assert isinstance(encoding, TopK)
        payload = {"ids": ids_NK.to(torch.uint16 if vocabulary <= 2**16 else torch.int32)}
        payload["logits"] = log_NK.clamp_min(-1e4).to(DTYPES[encoding.dtype])
        if ids_NK.shape[1] < vocabulary:
            rest_N = (1 - log_NK.exp().sum(-1)).clamp_min(1e-9)  # rounding can leave less than nothing
            payload["tails"] = rest_N.log().float()[:, None]
        return payload

    def _header(self, context: Context, tokenizer: Any) -> Header:
        parent = context.parents["teacher"]
        teacher = parent["content_hash"]
        if not self.teacher.runs_here:
            teacher = f"{self.teacher.endpoint.url} {self.teacher.endpoint.model}"
        template = getattr(tokenizer, "chat_template", None)
        if self.data.chat_template is not None:
            template = packing.chat_template(tokenizer, self.data)
        return Header(
            describe(self._encoding),
            len(tokenizer),
            teacher,
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
                    _link(path, folder / path.name)
            tokenizer.save_pretrained(folder)
            load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).save_pretrained(folder)

        stored = sum(path.stat().st_size for path in shards.glob("shard-*.safetensors"))
        print(f"{context.stage}: {prepared['tokens']:,} tokens, {stored / max(1, prepared['tokens']):.1f} bytes each")
        artifact.publish(
            context.out,
            build,
            {
                **context.manifest("signal"),
                "tokens": prepared["tokens"],
                "seconds": round(seconds, 3),
                "metrics": {
                    "encoding": header.encoding,
                    "pieces": prepared["pieces"],
                    "bytes_per_token": stored / max(1, prepared["tokens"]),
                    "fidelity": measured or None,  # a server gives no dense truth to measure against
                    "data": prepared["statistics"],
                },
                "certificates": {},
            },
        )


class Known:
    """Pieces that are on disk, or have been taken up since."""

    def __init__(self, shards: Path, header: Header) -> None:
        self.there, self.taken = Cache(shards, header), set[bytes]()

    def new(self, pieces: list[Piece]) -> list[Piece]:
        found = []
        for piece in pieces:
            if piece.key not in self.taken and piece.key not in self.there:
                self.taken.add(piece.key)
                found.append(piece)
        return found


def _states(hidden: Tensor, piece: Piece) -> Tensor:
    return hidden[piece.row][torch.from_numpy(piece.supervised).to(hidden.device)]


def _dense(signal: Signal, header: Header) -> tuple[Tensor, Head]:
    assert isinstance(signal, Dense)
    return signal.hidden, signal.head.restricted(header.vocabulary, signal.hidden.dtype)


def _nothing(batch: dict[str, Any], signal: Signal) -> None:
    """This rank has run out of rows; it reads one along with the others."""


def _batch(rows: Any, numbers: list[int], tokenizer: Any, place: torch.device) -> dict[str, Any]:
    batch = collate([rows[number] for number in numbers], pad_token=pad_token(tokenizer))
    return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in batch.items()}


def _shown(count: int, shown: bool) -> Iterator[int]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown) as progress:
        yield from progress.track(range(count), description="recording")


def _join(device: str) -> torch.device:
    """A process group over the ranks that torchrun or srun has started, and this rank's device."""
    from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    here = TorchElasticEnvironment() if TorchElasticEnvironment.detect() else SLURMEnvironment(auto_requeue=False)
    torch.distributed.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://{here.main_address}:{here.main_port}",
        rank=here.global_rank(),
        world_size=here.world_size(),
        timeout=timedelta(hours=12),  # ranks may finish far apart
    )
    place = torch.device(device, here.local_rank()) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    return place


def _link(source: Path, target: Path) -> None:
    """The same bytes under a second name: killed in between, neither is lost."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)
