"""A teacher behind HTTP: vLLM, llama.cpp's server, or another that speaks OpenAI's completions.

Tokens travel as ids in both directions: text would be tokenized again on the other side, not always into the same ids.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import httpx
import numpy as np
from jaxtyping import Float32, Int64

from models.errors import Refusal
from models.teachers.connection import Connection, Unanswered
from models.teachers.dialects.dialect import Continue, Generation, Row
from models.teachers.server import Served, Server, names_to_choose

K = TypeVar("K")
R = TypeVar("R")

# JSON has no -inf: vLLM writes -9999 for it, llama.cpp the lowest float.
MINUS_INFINITY = -9999.0
REACH_SECONDS = 15.0  # for each request of `reach`
FIRST_TOKENS = [0, 1]  # of any vocabulary


@dataclass(frozen=True)
class Endpoint:
    """Where a served teacher is and how it is asked."""

    # fields that change nothing that is made, beyond rounding (pipeline/config.py, identity)
    immaterial: ClassVar[frozenset[str]] = frozenset(
        {"concurrency", "retries", "timeout_seconds", "answer_mb", "api_key_variable"}
    )

    url: str  # http://host:8000/v1
    model: str | None = None  # null: the first that /models lists
    top_k: int = 64
    dialect: str = "auto"  # vllm | openai | llama.cpp; auto: found out once
    concurrency: int = 16  # requests in flight
    retries: int = 6  # per request; the pauses between them add up to about a minute
    timeout_seconds: int | float = 120  # for the whole of a request, to the last byte of its answer
    answer_mb: int = 256  # of the longest answer that is read
    api_key_variable: str = "OPENAI_API_KEY"  # the name of an environment variable, never the key

    def check(self) -> None:
        """Refuse values that cannot work. Asks nothing of the network."""
        if re.search(r"[@?#]", self.url):  # not said: it stands in logs, and in every record of the run
            raise Refusal(
                "teacher.endpoint.url: it holds a user, a password or a query, and would be written into every record "
                "of the run; give host and path alone, and the key in the environment variable that "
                "teacher.endpoint.api_key_variable names"
            )
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise Refusal(f"teacher.endpoint.url={self.url}: need a url such as http://host:8000/v1")
        if self.dialect not in names_to_choose():
            raise Refusal(f"teacher.endpoint.dialect={self.dialect}: need one of {', '.join(names_to_choose())}")
        for name, least in (("top_k", 1), ("concurrency", 1), ("retries", 0), ("answer_mb", 1)):
            if getattr(self, name) < least:
                raise Refusal(f"teacher.endpoint.{name}={getattr(self, name)}: need {least} or more")
        if not 0 < self.timeout_seconds < math.inf:
            raise Refusal(
                f"teacher.endpoint.timeout_seconds={self.timeout_seconds}: need more than 0; 120 suits most servers"
            )
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_variable):
            # What is no name may be the key itself, and a message ends in logs.
            raise Refusal(
                "teacher.endpoint.api_key_variable: need the name of an environment variable, such as OPENAI_API_KEY"
            )

    def ask(self) -> Served:
        """The server's kind and the model it will be asked for. Raises Refusal if nothing answers."""
        self.check()
        server = self._server()
        try:
            return server.ask()
        except Unanswered as problem:
            raise self._down(problem, 0) from None
        finally:
            server.connection.close()

    def reach(self, scores: bool) -> Served:
        """As `ask`, in one try and a short time, before a run begins: that the server is there and lists the model.
        `scores`: that it gives `top_k` log-probabilities of given tokens, too; of two tokens."""
        brief = min(self.timeout_seconds, REACH_SECONDS)
        server = dataclasses.replace(self, retries=0, timeout_seconds=brief)._server()
        try:
            found = server.ask()
            if self.model is not None:
                server.check_lists(self.model)
            if scores:
                server.settle_scoring(FIRST_TOKENS)
                server.rows(FIRST_TOKENS)
            return found
        except Unanswered as problem:
            said = f"({problem})"
            if problem.late and brief < self.timeout_seconds:  # not the user's setting
                said = f"within the {brief:g} s that the check gives it"
            raise Refusal(
                f"teacher.endpoint.url={self.url}: no answer {said}; start the server or correct the address"
            ) from None
        finally:
            server.connection.close()

    def score(
        self, pieces: Iterable[tuple[K, list[int]]]
    ) -> Iterator[tuple[K, Int64[np.ndarray, "rows k"], Float32[np.ndarray, "rows k"]]]:
        """The teacher's best next tokens after every prefix of every piece, as they come, in no order.

        A piece of T token ids gives T-1 rows; row i holds ids and natural log-probabilities (temperature 1, over the
        full vocabulary) after ids 0..i, best first. `k` is `top_k`, or the vocabulary where that is smaller. A token
        that the server holds impossible is left out: its place, at the row's end, holds id -1 at -inf.

        `pieces` is read as answers arrive, at most `concurrency` ahead. Servers need room for T+1 tokens.

        Raises Refusal when the server refuses (`top_k` among others), answers what cannot be used (token strings,
        NaN), or stays down through all `retries`; whatever came before was yielded.
        """
        self.check()

        def work(server: Server, piece: tuple[K, list[int]]) -> tuple[K, np.ndarray, np.ndarray]:
            key, ids = piece
            if not ids:
                raise Refusal(f"the piece {key!r} holds no token; leave empty pieces out")
            rows = server.rows(ids) if len(ids) > 1 else []
            return key, *_best(rows, self.top_k, self.url)

        return self._gather(pieces, work, lambda server, first: server.settle_scoring(first[1]))

    def generate(
        self,
        prompts: Iterable[tuple[K, list[int] | str] | tuple[K, list[int] | str, int]],
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[tuple[K, Generation]]:
        """A continuation of every prompt, as they come, in no order. Text prompts are tokenized by the server.

        Sampling is from the model alone: top-k, min-p and repetition penalties that a server would add by itself are
        switched off where its kind is known. `seed` is the same for every prompt that brings none of its own, as
        (key, prompt, seed). vLLM and llama.cpp give ids too.

        Raises Refusal as `score` does.
        """
        self.check()
        settings = Continue(max_new_tokens, temperature, top_p, list(stop))

        def work(server: Server, item: tuple[K, list[int] | str, int | None]) -> tuple[K, Generation]:
            key, prompt, own = item
            return key, server.continuation(prompt, settings, own)

        items = ((item[0], item[1], item[2] if len(item) == 3 else seed) for item in prompts)
        return self._gather(items, work, lambda server, _: server.settle())

    def _gather(
        self,
        items: Iterable[K],
        work: Callable[[Server, K], R],
        prepare: Callable[[Server, K], None],
    ) -> Iterator[R]:
        """`prepare` on the first item, then `work` on all in threads; what is done is yielded whatever else fails."""
        server = self._server()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher")
        running: set[Future[R]] = set()
        feed, exhausted, prepared, given = iter(items), False, False, 0
        failure: Refusal | Unanswered | None = None
        try:
            while True:
                while not exhausted and failure is None and len(running) < self.concurrency:
                    try:
                        item = next(feed)
                    except StopIteration:
                        exhausted = True
                        break
                    if not prepared:
                        try:
                            prepare(server, item)
                        except Unanswered as problem:
                            raise self._down(problem, given) from None
                        prepared = True
                    running.add(pool.submit(work, server, item))
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        result = future.result()
                    except (Refusal, Unanswered) as problem:
                        failure = failure or problem
                        server.connection.stopped.set()  # the others finish the request they are in, and try no more
                    else:
                        given += 1
                        yield result
            if isinstance(failure, Unanswered):
                raise self._down(failure, given) from None
            if failure is not None:
                raise failure
        finally:
            server.connection.stopped.set()
            pool.shutdown(cancel_futures=True)
            server.connection.close()

    def _server(self) -> Server:
        connection = Connection(
            self.url,
            top_k=self.top_k,
            concurrency=self.concurrency,
            retries=self.retries,
            timeout_seconds=self.timeout_seconds,
            answer_mb=self.answer_mb,
            api_key_variable=self.api_key_variable,
        )
        return Server(connection, self.dialect, self.model)

    def _down(self, problem: Unanswered, given: int) -> Refusal:
        kept = f"the {given} answers before it are kept; " if given else ""
        return Refusal(
            f"teacher.endpoint.url={self.url}: no usable answer in {self.retries + 1} tries ({problem}); {kept}"
            f"see to the server and run the same command again to go on"
        )


def _best(rows: Sequence[Row], k: int, url: str) -> tuple[Int64[np.ndarray, "rows k"], Float32[np.ndarray, "rows k"]]:
    """The best k of every row, best first.

    A row may hold one entry more than was asked for: the prompt's own token, wherever it ranks. Rows of fewer than k
    (a small vocabulary, a server's silent limit) are shortened to the shortest: beyond it an entry could be that token,
    and better ones might be missing before it.
    """
    width = min([k, *map(len, rows)])
    ids_NK = np.full((len(rows), width), -1, dtype=np.int64)
    values_NK = np.full((len(rows), width), -np.inf, dtype=np.float32)
    for row, ids_K, values_K in zip(rows, ids_NK, values_NK, strict=True):
        # llama.cpp's JSON library writes null for NaN. Rounding may lift a certain token just above 0.
        for value in row.values():
            if value is None or not value <= 1e-3:
                raise Refusal(
                    f"teacher.endpoint.url={url}: it gave {value} for a log-probability; its weights or its precision "
                    f"are broken"
                )
        likely = [(value, token) for token, value in row.items() if value is not None and value > MINUS_INFINITY]
        likely = sorted(likely, key=lambda entry: -entry[0])[:width]
        ids_K[: len(likely)] = [token for _, token in likely]
        values_K[: len(likely)] = [value for value, _ in likely]
    return ids_NK, values_NK
