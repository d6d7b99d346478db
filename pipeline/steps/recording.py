"""Recording a teacher's signal: which pieces of the text are outstanding, and their logits from a model or a server."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import seeds
from models.errors import Refusal
from models.load import DTYPES, attention_for, load_config
from models.objectives.head import Head
from models.objectives.representation import Wanted
from models.objectives.signal import Dense, Signal
from models.teachers.cache import Cache, Header, read_header, save_head
from models.teachers.encodings.encoding import Encoding
from models.teachers.encodings.fidelity import fidelities
from models.teachers.encodings.top_k import TopK
from models.teachers.endpoint import Endpoint
from models.teachers.pieces import Piece, pieces_of, scan
from models.teachers.precision import by_own_forward, by_spacing, has_weights
from models.teachers.served_payload import served_payload
from models.teachers.shards import Shard, Writer
from models.teachers.teacher import Opening, Source
from pipeline.context import Context
from pipeline.data.batch import collate, pad_token
from pipeline.progress import shown
from pipeline.steps.shelf import link
from pipeline.training.ranks import beat, join, leave, watch
from pipeline.training.strategy import prepare_environment

_FLUSH_SECONDS = 300.0


def fits(made: Path, header: Header) -> bool:
    """Whether it holds shards of this signal."""
    try:
        return read_header(made) == header
    except Refusal:
        return False


def adopt(old: Path, shards: Path, header: Header, others: bool = False) -> None:
    """Link the shards that an earlier result holds of the same signal, even if the text is another or a shard is lost.

    Every piece of them is verified, so that a damaged shard is left behind. `others`: made by other jobs, which name
    theirs alike; here they are named by what they hold, so that whoever takes them over from several has them once.
    """
    if not fits(old, header):
        return
    for path in sorted(old.glob("shard-*.safetensors")):
        if not others and (shards / path.name).exists():
            continue
        try:
            (shard := Shard(path)).verify()
        except Refusal:
            continue
        target = shards / (shard.name_by_content if others else path.name)
        if not target.exists():
            link(path, target)


@dataclass(frozen=True)
class Outstanding:
    sequences: list[int]  # that hold a piece which is not on disk
    pieces: int  # of all sequences, or of the share of them, on disk or not, each once
    tokens: int  # supervised, of these pieces


def outstanding(sequences: Any, header: Header, shards: Path, share: tuple[int, int] | None = None) -> Outstanding:
    """Of all sequences, or of the i-th of n parts of them (`share` = (i, n), i from 1)."""
    there, mine = Cache(shards, header), range(len(sequences))
    if share is not None:
        mine = range(len(mine) * (share[0] - 1) // share[1], len(mine) * share[0] // share[1])
    number_P, tokens_P, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], list[bytes]()
    new_P = [np.zeros(0, bool)]
    for numbers, counts, some in scan(sequences, header.fingerprint, mine):
        number_P.append(numbers)
        tokens_P.append(counts)
        keys.append(b"".join(some))
        new_P.append(~there.holds(some))
    first_P = _first(np.frombuffer(b"".join(keys), dtype=np.uint64).reshape(-1, 2))
    todo = np.unique(np.concatenate(number_P)[np.concatenate(new_P) & first_P])
    return Outstanding(todo.tolist(), int(first_P.sum()), int(np.concatenate(tokens_P)[first_P].sum()))


def _first(keys_P2: Any) -> Any:
    """Which keys have not occurred before."""
    order = np.lexsort((keys_P2[:, 1], keys_P2[:, 0]))
    changed = np.ones(len(order), dtype=bool)
    changed[1:] = (keys_P2[order[1:]] != keys_P2[order[:-1]]).any(axis=1)
    first_P = np.zeros(len(order), dtype=bool)
    first_P[order[changed]] = True  # lexsort is stable
    return first_P


@dataclass(frozen=True)
class Recording:
    """Writes the pieces of the sequences `todo` to `shards`."""

    teacher: Source
    encoding: Encoding
    sequences: Any  # pipeline.data.sequences.Sequences
    todo: list[int]
    tokenizer: Any
    header: Header
    shards: Path
    shard_bytes: int

    def from_model(self, context: Context, packing: Any, batch_size: int, sample_tokens: int) -> dict[str, Any]:
        """On every rank. Returns the encoding's fidelity by temperature, on rank 0."""
        prepare_environment(context.device)
        world, rank = context.world, context.rank
        place = join(context) if world > 1 else torch.device(context.device)
        attention = attention_for("auto", context.device, DTYPES[self.teacher.dtype])
        opening = Opening(self.header.vocabulary, attention, packing, device=context.device)
        teacher = self.teacher.asked_once().open(opening)
        if isinstance(teacher, torch.nn.Module):
            teacher.to(place)
        known, measured = Known(self.shards, self.header), {}
        writer = Writer(self.shards, rank, self.shard_bytes)

        def encode(batch: dict[str, Any], signal: Signal) -> None:
            hidden, head = self._dense(signal)
            for piece in known.new(pieces_of(batch, self.header.fingerprint)):
                payload = self.encoding.encode(piece.states(hidden), head, seeds.of_piece(piece.key))
                writer.add(piece.key, payload)

        def measure(batch: dict[str, Any], signal: Signal) -> None:
            hidden, head = self._dense(signal)
            if rank == 0:
                pieces = pieces_of(batch, self.header.fingerprint)
                measured.update(fidelities(self.encoding, pieces, hidden, head, sample_tokens))
                if self.encoding.keeps_head:
                    save_head(self.shards, head)

        with torch.no_grad():
            teacher.check()  # which reads a sharded one
            watch(context, teacher)
            mine = self.todo[rank::world]
            # As many batches on every rank: a sharded teacher takes all of them for every forward.
            rounds = -(-len(self.todo) // (batch_size * world))
            for number in shown(range(rounds), rounds, "recording", rank == 0):
                numbers = mine[number * batch_size : (number + 1) * batch_size]
                batch = self._batch(numbers or [0], place)
                teacher.give(teacher.look(batch, Wanted()), partial(encode if numbers else _nothing, batch))
                writer.flush_after(_FLUSH_SECONDS)
                beat()
            writer.flush()
            batch = self._batch(list(range(min(batch_size, len(self.sequences)))), place)
            teacher.give(teacher.look(batch, Wanted()), partial(measure, batch))
        teacher.close()
        if world > 1:
            leave(context)
        return measured

    def prove(self, server: Endpoint, context: Context, sample_tokens: int) -> dict[str, Any] | None:
        """What the server is and computes in, as a sample of what is still to be asked shows. Raises Refusal where
        that contradicts teacher.dtype. None where nothing is to be asked."""
        pieces: list[list[int]] = []
        for number in self.todo:
            batch = self._batch([number], torch.device("cpu"))
            for piece in pieces_of(batch, self.header.fingerprint):
                ids = batch["input_ids"][piece.row, piece.start : piece.stop].tolist()
                if len(ids) > 1 and sum(map(len, pieces)) < sample_tokens:
                    pieces.append(ids)
        if not pieces:
            return None
        answers = {at: (ids_TK, log_TK) for at, ids_TK, log_TK in server.score(enumerate(pieces))}
        told = [(torch.from_numpy(answers[at][0]), torch.from_numpy(answers[at][1])) for at in range(len(pieces))]
        path, remote = self.teacher.path, self.teacher.trust_remote_code
        if has_weights(path):
            found = by_own_forward(pieces, told, path, context.work / "proof", context.device, remote)
        else:
            found = by_spacing(told)
        found.check(self.teacher.dtype, server.url)
        said = server.ask()
        print(
            f"{context.stage}: the server computes in {found.dtype or 'an unknown dtype'} ({found.proof})", flush=True
        )
        return {"kind": said.kind, "model": said.model, **found.as_json()}

    def from_server(self, server: Endpoint) -> None:
        """Asks a server for its log-probabilities at every token of every new piece."""
        known, writer = Known(self.shards, self.header), Writer(self.shards, 0, self.shard_bytes)
        columns = load_config(self.teacher.path, "teacher", self.teacher.trust_remote_code).vocab_size
        encoding, vocabulary = self.encoding, self.header.vocabulary
        assert isinstance(encoding, TopK)  # as Encoding.of_server makes it

        def pieces() -> Iterator[tuple[tuple[bytes, Any], list[int]]]:
            for number in shown(range(len(self.todo)), len(self.todo), "recording"):
                batch = self._batch([self.todo[number]], torch.device("cpu"))
                for piece in known.new(pieces_of(batch, self.header.fingerprint)):
                    ids = batch["input_ids"][piece.row, piece.start : piece.stop].tolist()
                    yield (piece.key, piece.supervised - piece.start), ids

        try:
            for (key, supervised), ids_TK, log_TK in server.score(pieces()):
                ids_NK, log_NK = ids_TK[supervised], log_TK[supervised]
                writer.add(key, served_payload(encoding, ids_NK, log_NK, vocabulary, columns, self.teacher.path))
                writer.flush_after(_FLUSH_SECONDS)
        finally:  # a server that stays down, or an interrupt: the answers so far are kept
            writer.flush()

    def _dense(self, signal: Signal) -> tuple[Tensor, Head]:
        assert isinstance(signal, Dense)
        return signal.hidden, signal.head.restricted(self.header.vocabulary, signal.hidden.dtype)

    def _batch(self, numbers: list[int], place: torch.device) -> dict[str, Any]:
        batch = collate([self.sequences.arrays(number) for number in numbers], pad_token=pad_token(self.tokenizer))
        return {name: value.to(place) if isinstance(value, Tensor) else value for name, value in batch.items()}


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


def _nothing(batch: dict[str, Any], signal: Signal) -> None:
    """This rank has no more sequences; it runs one along with the others."""
