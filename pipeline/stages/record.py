"""Write a teacher's signal to disk once, so that students train without it."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models import seeds
from models.errors import Refusal
from models.heads import logit_numbers
from models.load import DTYPES, attention_for, empty_model, load_config, parameter_count
from models.objectives.head import Head
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal
from models.teachers.cache import (
    HEADER,
    Cache,
    Header,
    Piece,
    Shard,
    Writer,
    pieces_of,
    read_header,
    save_head,
    scan,
    write_header,
)
from models.teachers.encodings.encoding import Encoding, Payload, describe
from models.teachers.encodings.fidelity import fidelity
from models.teachers.encodings.top_k import FLOOR, TopK, ids_dtype
from models.teachers.teacher import Opening, Source
from pipeline import artifact
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.data.conversations import tokenizer_of
from pipeline.data.pairs import teacher_side
from pipeline.data.prepared import sequences_of
from pipeline.data.source import DataSource, check_source, source_key
from pipeline.data.tokenizer import load_tokenizer, tokenizer_key
from pipeline.planned import teacher_config
from pipeline.progress import shown
from pipeline.shelf import Shelf, link
from pipeline.stages.stage import Makes, Stage
from pipeline.stages.stage import Plan as StagePlan
from pipeline.training.ranks import join
from pipeline.training.settings import check_length
from pipeline.training.strategy import prepare_environment

_FLUSH_SECONDS = 300.0


@dataclass(frozen=True)
class Record(Stage):
    makes: ClassVar[Makes] = "signal"
    on_demand: ClassVar[bool] = True
    immaterial: ClassVar[frozenset[str]] = frozenset({"batch_size", "shard_mb", "sample_tokens"})

    data: DataSource
    teacher: Any  # a Source that needs a record: cached, served
    encoding: Encoding
    batch_size: int = 8  # rows the teacher reads at once; memory only
    shard_mb: int = 256  # of one file; what an interrupted run has to do again, at most, or what five minutes gave
    sample_tokens: int = 512  # on which the encoding is measured against the dense teacher

    def __post_init__(self) -> None:
        for name in ("batch_size", "shard_mb", "sample_tokens"):
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
        return {"teacher": self.teacher.path, **self.data.made_by_stages}

    def content(self) -> str:
        """Hash of the text it reads."""
        return source_key(self.data)

    def check(self, context: Context) -> StagePlan:
        corpus = check_source(context, self.data)
        if not getattr(self.teacher, "needs_record", False):
            raise Refusal(f"{context.stage} records for teacher=cached or teacher=served; there is nothing to record")
        if not self.teacher.runs_here:
            self.teacher.endpoint.check()
            if not isinstance(self.encoding, TopK):
                raise Refusal(
                    f"encoding={self.encoding.name}: a server gives the best k tokens alone; use encoding=top_k and "
                    f"teacher.endpoint.top_k"
                )
            if self.encoding.k not in (TopK().k, self.teacher.endpoint.top_k):
                raise Refusal(
                    f"encoding.k={self.encoding.k}: of a server, teacher.endpoint.top_k="
                    f"{self.teacher.endpoint.top_k} decides; set that one"
                )
        if self.data.teacher_prompts > 1:
            raise Refusal(
                f"task.draws={self.data.teacher_prompts}: the mean of several prompts' distributions is not recorded; "
                f"use task.draws=1, or teacher=online or sharded"
            )
        config = teacher_config(context, self.teacher, weights=self.teacher.runs_here)
        check_length(config, self.data, "teacher")
        planned = Header(describe(self._encoding), config.vocab_size, "", "", None, self.teacher.dtype)
        config.save_pretrained(self._planned(context))
        write_header(self._planned(context), planned)
        return StagePlan(
            model=config.model_type,
            data=corpus,
            until="one pass over the training text",
            teacher=f"{self.teacher.path} ({parameter_count(empty_model(config)):,})",
            commits={"teacher": getattr(config, "_commit_hash", None)},
        )

    def _planned(self, context: Context) -> Path:
        assert context.plans is not None
        folder = context.plans / context.stage
        folder.mkdir(exist_ok=True)
        return folder

    def prepare(self, context: Context) -> None:
        """Rows, and which of them are still to be read; one process, before the ranks."""
        tokenizer = tokenizer_of(self.teacher.path, self.data, self.teacher.trust_remote_code)
        context.work.mkdir(parents=True, exist_ok=True)
        rows, statistics, folder = sequences_of(self.data, "train", tokenizer, context.data_folder)
        rows = teacher_side(rows)
        if not len(rows):
            raise Refusal(f"{context.stage}: no row of data.train is left after tokenizing ({statistics})")
        header = self._header(context, tokenizer)
        shards = self._shelf(context).open(context, header.fingerprint.hex()[:16])
        write_header(shards, header)
        if context.stage not in context.config["force"]:
            _adopt(context.out, shards, header)
        there = Cache(shards, header)
        row_P, tokens_P, keys, new_P = [], [], [], []
        for numbers, counts, some in scan(rows, header.fingerprint):
            row_P.append(numbers)
            tokens_P.append(counts)
            keys.append(b"".join(some))
            new_P.append(~there.holds(some))
        first_P = _first(np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2))
        todo = np.unique(np.concatenate(row_P)[np.concatenate(new_P) & first_P])
        artifact.write_json(
            context.work / "prepared.json",
            {
                "rows": str(folder),
                "shards": str(shards),
                "todo": todo.tolist(),
                "pieces": int(first_P.sum()),
                "tokens": int(np.concatenate(tokens_P)[first_P].sum()),
                "statistics": statistics,
            },
        )

    def run(self, context: Context) -> None:
        from datasets import load_from_disk

        prepared = json.loads((context.work / "prepared.json").read_text())
        tokenizer = load_tokenizer(self.teacher.path, self.teacher.trust_remote_code)
        rows = teacher_side(load_from_disk(prepared["rows"]))
        shards = Path(prepared["shards"])
        header = read_header(shards)
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
        place = join(context.device) if world > 1 else torch.device(context.device)
        attention = attention_for("auto", context.device, DTYPES[self.teacher.dtype])
        source: Source = self.teacher.recorder
        teacher: Any = source.open(Opening(header.vocabulary, attention, self.data.packing, device=context.device))
        if isinstance(teacher, torch.nn.Module):
            teacher.to(place)
        known, measured = Known(shards, header), {}
        writer = Writer(shards, rank, self.shard_mb * 2**20)

        def encode(batch: dict[str, Any], signal: Signal) -> None:
            hidden, head = _dense(signal, header)
            for piece in known.new(pieces_of(batch, header.fingerprint)):
                writer.add(piece.key, self._encoding.encode(_states(hidden, piece), head, seeds.of_piece(piece.key)))

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
            rounds = -(-len(todo) // (self.batch_size * world))
            for number in shown(range(rounds), rounds, "recording", rank == 0):
                numbers = mine[number * self.batch_size : (number + 1) * self.batch_size]
                batch = _batch(rows, numbers or [0], tokenizer, place)
                teacher.give(teacher.look(batch, Wanted()), partial(encode if numbers else _nothing, batch))
                writer.flush_after(_FLUSH_SECONDS)
            writer.flush()
            batch = _batch(rows, list(range(min(self.batch_size, len(rows)))), tokenizer, place)
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
        payloads = [self._encoding.encode(_states(hidden, piece), head, seeds.of_piece(piece.key)) for piece in chosen]
        payload = {name: torch.cat([each[name] for each in payloads]) for name in payloads[0]}
        states_NH = torch.cat([_states(hidden, piece) for piece in chosen])
        one = [getattr(self._encoding, "temperature", 1.0)]
        return {
            f"{temperature:g}": fidelity(self._encoding, payload, states_NH, head, temperature)
            for temperature in getattr(self._encoding, "temperatures", one)
        }

    def _ask(self, rows: Any, todo: list[int], tokenizer: Any, header: Header, shards: Path) -> None:
        """Of a server, what it says after every token of every new piece."""
        known, writer = Known(shards, header), Writer(shards, 0, self.shard_mb * 2**20)
        columns = load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).vocab_size

        def pieces() -> Iterator[tuple[tuple[bytes, Any], list[int]]]:
            for number in shown(range(len(todo)), len(todo), "recording"):
                batch = _batch(rows, [todo[number]], tokenizer, torch.device("cpu"))
                for piece in known.new(pieces_of(batch, header.fingerprint)):
                    ids = batch["input_ids"][piece.row, piece.start : piece.stop].tolist()
                    yield (piece.key, piece.supervised - piece.start), ids

        try:
            for (key, supervised), ids_TK, log_TK in self.teacher.endpoint.score(pieces()):
                writer.add(key, self._served(ids_TK[supervised], log_TK[supervised], header.vocabulary, columns))
                writer.flush_after(_FLUSH_SECONDS)
        finally:  # a server that stays down, or an interrupt: what has come is kept
            writer.flush()

    def _served(self, ids_NK: Any, log_NK: Any, vocabulary: int, columns: int) -> Payload:
        """`columns`: of the model's table, which can be padded beyond its tokenizer's `vocabulary`."""
        if ids_NK.size and ids_NK.max() >= columns:
            raise Refusal(
                f"teacher.path={self.teacher.path}: the server names token {ids_NK.max()}, and its model has "
                f"{columns}; give the tokenizer and the config of the model that is served"
            )
        encoding = self._encoding
        assert isinstance(encoding, TopK)
        width = min(encoding.k, vocabulary)
        if ids_NK.shape[1] < width:
            raise Refusal(
                f"teacher.endpoint.top_k={encoding.k}: the server gives {ids_NK.shape[1]} tokens at most; set "
                f"teacher.endpoint.top_k={ids_NK.shape[1]}"
            )
        ids_NK, log_NK = _distinct(ids_NK, log_NK.astype(np.float64), width, vocabulary)
        payload = {
            "ids": torch.from_numpy(ids_NK).to(ids_dtype(vocabulary)),
            "logits": torch.from_numpy(log_NK).to(DTYPES[encoding.dtype]),
        }
        if ids_NK.shape[1] < vocabulary:
            rest_N = (1 - np.exp(log_NK).sum(-1)).clip(1e-9)  # rounding can leave less than nothing
            payload["tails"] = torch.from_numpy(np.log(rest_N)).float()[:, None]
        return payload

    def _header(self, context: Context, tokenizer: Any) -> Header:
        parent = context.parents["teacher"]
        teacher = parent["content_hash"]
        if not self.teacher.runs_here:
            endpoint = self.teacher.endpoint  # asked for its model: what answers at an address can change
            teacher = f"served {endpoint.model or endpoint.ask().model}"
        template = getattr(tokenizer, "chat_template", None)
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
                    link(path, folder / path.name)
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
                "seconds": round(seconds, 3),
                "metrics": {
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

    def _shelf(self, context: Context) -> Shelf:
        return Shelf(context.work.parent / "signals" / context.stage)


class Known:
    """Pieces that are on disk, or have been taken up since."""

    def __init__(self, shards: Path, header: Header) -> None:
        self.there, self.taken = Cache(shards, header), set[bytes]()

    def new(self, pieces: list[Piece]) -> list[Piece]:
        found = []
        for piece, there in zip(pieces, self.there.holds([piece.key for piece in pieces]), strict=True):
            if not there and piece.key not in self.taken:
                self.taken.add(piece.key)
                found.append(piece)
        return found


def _adopt(old: Path, shards: Path, header: Header) -> None:
    """What an earlier result holds of the same signal need not be recorded again, be the text another or a shard lost.

    Every piece of it is verified, so that a damaged shard is left behind.
    """
    if not (old / HEADER).exists() or read_header(old) != header:
        return
    for path in sorted(old.glob("shard-*.safetensors")):
        try:
            Shard(path).verify()
        except Refusal:
            continue
        if not (shards / path.name).exists():
            link(path, shards / path.name)


def _first(keys_P2: Any) -> Any:
    """Which keys have not stood before."""
    order = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
    changed = np.ones(len(order), dtype=bool)
    changed[1:] = (keys_P2[order[1:]] != keys_P2[order[:-1]]).any(axis=1)
    first_P = np.zeros(len(order), dtype=bool)
    first_P[order[changed]] = True  # lexsort is stable
    return first_P


def _distinct(ids_NK: Any, log_NK: Any, width: int, vocabulary: int) -> tuple[Any, Any]:
    """`width` different tokens in every row, where a server named columns that are no tokens, or left a place empty.

    Twice the same id would be twice the student's probability of it. A place is empty (-1) where no other token is
    possible; where a column gave way, another token has the average of what is left.
    """
    token_NK = (ids_NK >= 0) & (ids_NK < vocabulary)
    beyond_N = np.where(ids_NK >= vocabulary, np.exp(log_NK), 0).sum(-1, keepdims=True)
    log_NK = np.where(token_NK, (log_NK - np.log1p(-beyond_N)).clip(FLOOR), FLOOR)
    order = np.argsort(~token_NK, axis=-1, kind="stable")[:, :width]
    impossible_N = (ids_NK < 0).any(-1)
    ids_NK, log_NK, token_NK = (np.take_along_axis(each, order, -1) for each in (ids_NK, log_NK, token_NK))
    for row in np.flatnonzero(~token_NK.all(-1)):
        known, empty = token_NK[row], ~token_NK[row]
        free = np.setdiff1d(np.arange(min(vocabulary, 2 * width)), ids_NK[row, known])
        ids_NK[row, empty] = free[: empty.sum()]
        if not impossible_N[row]:
            left = 1 - np.exp(log_NK[row, known]).sum()
            log_NK[row, empty] = np.log(max(left, 1e-9) / (vocabulary - known.sum()))
    return ids_NK, log_NK


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
