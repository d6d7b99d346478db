"""A teacher behind HTTP: vLLM, llama.cpp's server, or another that speaks OpenAI's completions.

Tokens travel as ids in both directions: text would be tokenized again on the other side, not always into the same ids.
"""

from __future__ import annotations

import email.utils
import logging
import math
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from threading import Event
from typing import Any, ClassVar, TypeVar

import httpx
import numpy as np
from jaxtyping import Float32, Int64

from models.errors import Refusal

K = TypeVar("K")
R = TypeVar("R")
Row = Mapping[int, float | None]  # id → natural log-probability, of one next token

DIALECTS = ("auto", "vllm", "openai", "llama.cpp")
FIRST_PAUSE_SECONDS = 1.0  # doubles with every further try
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0  # a server may ask for more patience than we have by ourselves, not for a day
TRANSIENT = {408, 425, 429} | set(range(500, 600)) - {501, 505}
# JSON has no -inf: vLLM writes -9999 for it, llama.cpp the lowest float.
MINUS_INFINITY = -9999.0
# llama.cpp withholds the probabilities of a token that ends inside a character; no more of them are banned at once.
BANNED_AT_MOST = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """A continuation. `ids` is None where the server tells only text; `finish_reason` is `stop` or `length`.

    `log_probabilities`: natural, at temperature 1, of each id; None where the server does not tell all of them.
    """

    text: str
    ids: list[int] | None
    finish_reason: str | None
    log_probabilities: list[float] | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Served:
    """What answers at the url. `kind` is vllm, llama.cpp, tgi, or unknown: any other OpenAI-compatible server."""

    kind: str
    model: str


@dataclass(frozen=True)
class Endpoint:
    """Where a served teacher is and how it is asked."""

    # fields that change nothing that is made, beyond rounding (pipeline/config.py, identity)
    immaterial: ClassVar[frozenset[str]] = frozenset({"concurrency", "retries", "timeout_seconds", "api_key_variable"})

    url: str  # http://host:8000/v1
    model: str | None = None  # null: the first that /models lists
    top_k: int = 64
    dialect: str = "auto"  # vllm | openai | llama.cpp; auto: asked once
    concurrency: int = 16  # requests in flight
    retries: int = 6  # per request; the pauses between them add up to about a minute
    timeout_seconds: int | float = 120
    api_key_variable: str = "OPENAI_API_KEY"  # the name of an environment variable, never the key

    def check(self) -> None:
        """Refuse values that cannot work. Asks nothing of the network."""
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL:
            parsed = httpx.URL("")
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise Refusal(f"teacher.endpoint.url={self.url}: need a url such as http://host:8000/v1")
        if parsed.userinfo:
            raise Refusal(
                "teacher.endpoint.url: it holds a password; put the key into the variable that "
                "teacher.endpoint.api_key_variable names"
            )
        if self.dialect not in DIALECTS:
            raise Refusal(f"teacher.endpoint.dialect={self.dialect}: need one of {', '.join(DIALECTS)}")
        for name, least in (("top_k", 1), ("concurrency", 1), ("retries", 0)):
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
        session = _Session(self)
        try:
            return session.served()
        except _Unanswered as problem:
            raise self._down(problem, 0) from None
        finally:
            session.close()

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

        def work(session: _Session, piece: tuple[K, list[int]]) -> tuple[K, np.ndarray, np.ndarray]:
            key, ids = piece
            if not ids:
                raise Refusal(f"the piece {key!r} holds no token; leave empty pieces out")
            rows = session.rows(ids) if len(ids) > 1 else []
            return key, *_best(rows, self.top_k, self.url)

        return self._gather(pieces, work, lambda session, first: session.settle_dialect(first[1]))

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
        (key, prompt, seed). vLLM and llama.cpp tell ids too.

        Raises Refusal as `score` does.
        """
        self.check()

        def work(session: _Session, item: tuple[K, list[int] | str, int | None]) -> tuple[K, Generation]:
            key, prompt, own = item
            return key, session.continuation(prompt, max_new_tokens, temperature, top_p, own, list(stop))

        items = ((item[0], item[1], item[2] if len(item) == 3 else seed) for item in prompts)
        return self._gather(items, work, lambda session, _: session.settle_server())

    def _gather(
        self,
        items: Iterable[K],
        work: Callable[[_Session, K], R],
        prepare: Callable[[_Session, K], None],
    ) -> Iterator[R]:
        """`prepare` on the first item, then `work` on all in threads; what is done is yielded whatever else fails."""
        session = _Session(self)
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="teacher")
        running: set[Future[R]] = set()
        feed, exhausted, prepared, given = iter(items), False, False, 0
        failure: Refusal | _Unanswered | None = None
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
                            prepare(session, item)
                        except _Unanswered as problem:
                            raise self._down(problem, given) from None
                        prepared = True
                    running.add(pool.submit(work, session, item))
                if not running:
                    break
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        result = future.result()
                    except (Refusal, _Unanswered) as problem:
                        failure = failure or problem
                        session.stopped.set()  # the others finish the request they are in, and try no more
                    else:
                        given += 1
                        yield result
            if isinstance(failure, _Unanswered):
                raise self._down(failure, given) from None
            if failure is not None:
                raise failure
        finally:
            session.stopped.set()
            pool.shutdown(cancel_futures=True)
            session.close()

    def _down(self, problem: _Unanswered, given: int) -> Refusal:
        kept = f"the {given} answers before it are kept; " if given else ""
        return Refusal(
            f"teacher.endpoint.url={self.url}: no usable answer in {self.retries + 1} tries ({problem}); {kept}"
            f"see to the server and run the same command again to go on"
        )


class _Unanswered(Exception):
    """A request that failed in a way that may pass, more often than `retries` allows."""


class _Rejected(Exception):
    """The server understood and said no."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class _Session:
    """The connections of one call, and what was found out about the server. Threads share it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.base = endpoint.url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self.stopped = Event()
        self.kind = self.model = self.dialect = ""
        self.said = -math.inf  # when a failed try was last reported
        self.harmless: int | None = None  # llama.cpp: a token whose probabilities it does not withhold
        key = os.environ.get(endpoint.api_key_variable, "")
        self.client = httpx.Client(
            timeout=endpoint.timeout_seconds,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=endpoint.concurrency, max_keepalive_connections=endpoint.concurrency),
        )

    def close(self) -> None:
        self.client.close()

    # --- one request ---

    def request(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a GET, or to a POST of `body`. Raises _Unanswered, _Rejected."""
        tries = self.endpoint.retries + 1
        reason = "stopped"
        for attempt in range(tries):
            if self.stopped.is_set():
                break
            asked_to_wait = 0.0
            try:
                response = self.client.request("GET" if body is None else "POST", url, json=body)
            except httpx.TimeoutException:
                reason = f"no answer within teacher.endpoint.timeout_seconds={self.endpoint.timeout_seconds:g}"
            except httpx.RequestError as problem:
                reason = str(problem) or type(problem).__name__
            else:
                if response.is_success:
                    try:
                        return response.json()
                    except ValueError:
                        reason = "its JSON broke off"
                elif response.status_code in TRANSIENT:
                    reason = f"{response.status_code}: {_message(response)}"
                    asked_to_wait = _retry_after(response)
                else:
                    raise _Rejected(response.status_code, _message(response))
            if attempt + 1 == tries:
                break
            # With jitter, or all that failed together would come back together.
            pause = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
            pause = max(pause, asked_to_wait)
            if time.monotonic() - self.said > 10:  # once, not once a thread
                self.said = time.monotonic()
                log.warning("teacher.endpoint.url=%s: %s; trying again in %.0f s", self.endpoint.url, reason, pause)
            if self.stopped.wait(pause):
                break
        raise _Unanswered(reason)

    def post(self, url: str, body: dict[str, Any]) -> Any:
        """`request` for answers that are needed: what the server rejects is a Refusal with the remedy."""
        try:
            return self.request(url, body)
        except _Rejected as problem:
            raise self.refusal(problem) from None

    def refusal(self, problem: _Rejected) -> Refusal:
        endpoint, message = self.endpoint, problem.message
        said = f"teacher.endpoint.url={endpoint.url}: the server says {problem.status}: {message}"
        if problem.status in (401, 403):
            return Refusal(f"{said}; set the environment variable {endpoint.api_key_variable} to its key")
        if problem.status == 404:
            return Refusal(
                f"{said}; see teacher.endpoint.model={self.model} and teacher.endpoint.url, which ends in /v1"
            )
        if "logprobs" in message and (limit := re.search(r"(?:max|at most|or equal to|up to)\D*(\d+)", message)):
            return Refusal(
                f"teacher.endpoint.top_k={endpoint.top_k}: the server says {problem.status}: {message}; set "
                f"teacher.endpoint.top_k={limit[1]}, or start vLLM with --max-logprobs {endpoint.top_k}"
            )
        if re.search(r"context (size|length)|max_model_len|longer than the maximum", message):
            return Refusal(
                f"{said}; a piece of T tokens needs room for T+1: shorten the rows or serve a longer context"
            )
        return Refusal(said)

    def unusable(self, what: str) -> Refusal:
        return Refusal(f"teacher.endpoint.url={self.endpoint.url} (dialect {self.dialect or 'auto'}): {what}")

    # --- who answers ---

    def served(self) -> Served:
        self.settle_server()
        return Served(self.kind, self.model)

    def settle_server(self) -> None:
        """Find out the kind of server, and the model's name where none was given; nothing is asked that is known."""
        told, self.model = self.endpoint.dialect, self.endpoint.model or ""
        if told != "auto" and (self.model or told == "llama.cpp"):
            self.kind = "unknown" if told == "openai" else told
            return
        listed = self.look(f"{self.base}/models")
        models = listed.get("data") or [{}]
        self.kind = {"vllm": "vllm", "llamacpp": "llama.cpp"}.get(str(models[0].get("owned_by")), "")
        if not self.kind and self.look(f"{self.root}/info").get("router") == "text-generation-router":
            self.kind = "tgi"
        if not self.kind and "default_generation_settings" in self.look(f"{self.root}/props"):
            self.kind = "llama.cpp"
        self.kind = self.kind or (told if told in ("vllm", "llama.cpp") else "unknown")
        self.model = self.model or str(models[0].get("id") or "")
        if not self.model:
            if self.kind == "unknown":
                raise Refusal(
                    f"teacher.endpoint.url={self.endpoint.url}: it lists no model; see that it ends in /v1, or set "
                    f"teacher.endpoint.model"
                )
            self.model = self.kind  # these serve one model and ignore its name

    def look(self, url: str) -> dict[str, Any]:
        """What is there, or nothing: a server that lacks the page is of another kind."""
        try:
            answer = self.request(url)
        except _Rejected as problem:
            if problem.status in (401, 403):
                raise self.refusal(problem) from None
            return {}
        return answer if isinstance(answer, dict) else {}

    def settle_dialect(self, ids: list[int]) -> None:
        """Find out how this server tells log-probabilities of given tokens; `ids` are some that it may be asked."""
        self.settle_server()
        self.dialect = self.endpoint.dialect
        if self.dialect != "auto":
            return
        if self.kind == "tgi":
            raise Refusal(
                f"teacher.endpoint.url={self.endpoint.url}: text-generation-inference tells only the log-probabilities "
                f"of a prompt's own tokens, not the best k beside them; serve the teacher with vLLM or llama.cpp"
            )
        if self.kind != "unknown":
            self.dialect = self.kind
            return
        probe = (ids * 2)[:2]
        try:
            answer = self.request(f"{self.base}/completions", self.vllm_body(probe, 1))
            told = _choice(answer).get("prompt_logprobs")
        except _Rejected:  # OpenAI's own schema knows no prompt_logprobs
            told = None
        self.dialect = "vllm" if told else "openai"

    # --- log-probabilities of given tokens ---

    def rows(self, ids: list[int]) -> list[Row]:
        """For a piece of T ≥ 2 ids, T-1 rows: what the server told after each prefix but the whole."""
        try:
            if self.dialect == "llama.cpp":
                return [self.llama_cpp_row(ids[:end]) for end in range(1, len(ids))]
            return self.vllm_rows(ids) if self.dialect == "vllm" else self.openai_rows(ids)
        except (AttributeError, KeyError, TypeError, ValueError) as problem:
            if isinstance(problem, Refusal):  # which is a ValueError
                raise
            raise self.unusable(f"its answer has another shape ({problem!r}); see teacher.endpoint.dialect") from None

    def vllm_body(self, ids: list[int], k: int) -> dict[str, Any]:
        # One token more than needed is generated: not all versions take 0.
        return {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": k}

    def vllm_rows(self, ids: list[int]) -> list[Row]:
        """`prompt_logprobs`: one entry a prompt token, null for the first; the token's own beside the best k."""
        answer = self.post(f"{self.base}/completions", self.vllm_body(ids, self.endpoint.top_k))
        told = _choice(answer).get("prompt_logprobs")
        if not isinstance(told, list) or len(told) != len(ids):
            count = len(told) if isinstance(told, list) else "no"
            raise self.unusable(
                f"{count} prompt_logprobs for {len(ids)} tokens; it is not vLLM, or an older one with prefix caching "
                f"(start it with --no-enable-prefix-caching)"
            )
        rows: list[Row] = []
        for own, entry in zip(ids[1:], told[1:], strict=True):
            if not isinstance(entry, dict) or str(own) not in entry:
                raise self.unusable(
                    "its prompt_logprobs are of other tokens than were sent; is the model the right one?"
                )
            rows.append({int(token): one["logprob"] for token, one in entry.items()})
        return rows

    def openai_rows(self, ids: list[int]) -> list[Row]:
        """`echo` with `logprobs`: the prompt's tokens and their best k, keyed `token_id:123` where the server can."""
        body = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 0,
            "temperature": 1.0,
            "echo": True,
            "logprobs": self.endpoint.top_k,
            "return_tokens_as_token_ids": True,
        }
        try:
            answer = self.request(f"{self.base}/completions", body)
        except _Rejected as problem:
            if re.search(r"return_tokens_as_token_ids|\becho\b|must be a string", problem.message):
                raise self.unusable(
                    f"the server says {problem.status}: {problem.message}; it cannot score given token ids: serve the "
                    f"teacher with vLLM or llama.cpp"
                ) from None
            raise self.refusal(problem) from None
        logprobs = _choice(answer).get("logprobs") or {}
        tokens, told = logprobs.get("tokens"), logprobs.get("top_logprobs")
        if not isinstance(tokens, list) or not isinstance(told, list) or min(len(tokens), len(told)) < len(ids):
            raise self.unusable(
                "it does not echo a prompt's log-probabilities, so it cannot score given tokens; serve the teacher "
                "with vLLM or llama.cpp"
            )
        if not all(str(token).startswith("token_id:") for token in tokens[: len(ids)]):
            raise self.unusable(
                f"it names tokens by their text ({tokens[0]!r}), which several ids can share, and not by id "
                f"(return_tokens_as_token_ids); serve the teacher with vLLM or llama.cpp"
            )
        if [_token_id(token) for token in tokens[: len(ids)]] != ids:
            raise self.unusable("it echoes other tokens than were sent; is the model the right one?")
        return [{_token_id(token): value for token, value in row.items()} for row in told[1 : len(ids)]]

    def llama_cpp_row(self, prefix: list[int]) -> Row:
        """One generated token's `top_logprobs`: a softmax of the raw logits, whatever is sampled from them.

        The server keeps the prefix in its cache, so that each costs one token. Which token it samples does not matter,
        except that it withholds the numbers of one that ends inside a UTF-8 character; such a one is banned, and once a
        token is known to be none it is made to win everywhere.
        """
        banned: list[int] = []
        for _ in range(BANNED_AT_MOST):
            harmless = None if banned else self.harmless
            answer = self.post(
                f"{self.root}/completion",
                {
                    "prompt": prefix,
                    "n_predict": 1,
                    "n_probs": self.endpoint.top_k,
                    "temperature": 0.0,
                    "cache_prompt": True,
                    "return_tokens": True,
                    "logit_bias": [[token, False] for token in banned]
                    + ([[harmless, 1e6]] if harmless is not None else []),
                    "response_fields": ["completion_probabilities", "tokens", "tokens_predicted", "tokens_evaluated"],
                },
            )
            if answer.get("tokens_evaluated") != len(prefix):
                raise self.unusable(
                    f"it read {answer.get('tokens_evaluated')} tokens where {len(prefix)} were sent; is it llama.cpp's?"
                )
            told, sampled = answer.get("completion_probabilities") or [], answer.get("tokens") or []
            if len(told) == 1 and answer.get("tokens_predicted") == 1:
                if "top_logprobs" not in told[0]:
                    raise self.unusable(
                        "it tells probabilities without ids; llama.cpp does since December 2024: update it"
                    )
                self.harmless = told[0].get("id")
                return {one["id"]: one["logprob"] for one in told[0]["top_logprobs"]}
            if not sampled or sampled[0] in banned:
                break
            banned.append(sampled[0])
        raise self.unusable("it tells no completion_probabilities; is it llama.cpp's server?")

    # --- continuations ---

    def continuation(
        self, prompt: list[int] | str, limit: int, temperature: float, top_p: float, seed: int | None, stop: list[str]
    ) -> Generation:
        body: dict[str, Any] = {"prompt": prompt, "temperature": temperature, "top_p": top_p}
        if seed is not None:
            body["seed"] = seed
        if stop:
            body["stop"] = stop
        if self.kind == "llama.cpp":
            plain = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "return_tokens": True, "n_predict": limit}
            plain["n_probs"] = 1
            answer = self.post(f"{self.root}/completion", body | plain)
            reason = "length" if answer.get("stop_type") == "limit" else "stop"
            ids, told = answer.get("tokens") or None, answer.get("completion_probabilities")
            return Generation(
                str(answer.get("content", "")), ids, reason, _told(ids, told, lambda one: (one["id"], one["logprob"]))
            )
        body |= {"model": self.model, "max_tokens": limit}
        if self.kind == "vllm":
            body |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True}
            body["logprobs"] = 1
        try:
            choice = _choice(self.request(f"{self.base}/completions", body))
        except _Rejected as problem:
            refusal = self.refusal(problem)
            if isinstance(prompt, str) or problem.status not in (400, 422) or self.kind == "vllm":
                raise refusal from None
            raise Refusal(f"{refusal}; a server that takes no token ids takes text prompts") from None
        if not isinstance(choice.get("text"), str):
            raise self.unusable("its completion holds no text; is it OpenAI-compatible?")
        ids, told = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        return Generation(
            choice["text"], ids, choice.get("finish_reason"), _told(ids, told, lambda value: (None, value))
        )


def _best(rows: Sequence[Row], k: int, url: str) -> tuple[Int64[np.ndarray, "rows k"], Float32[np.ndarray, "rows k"]]:
    """The best k of every row, best first.

    A row may hold one entry more than was asked for: the prompt's own token, wherever it ranks. Rows of fewer than k
    (a small vocabulary, a server's silent limit) are cut to the shortest: beyond it an entry could be that token, and
    better ones might be missing before it.
    """
    width = min([k, *map(len, rows)])
    ids_NK = np.full((len(rows), width), -1, dtype=np.int64)
    values_NK = np.full((len(rows), width), -np.inf, dtype=np.float32)
    for row, ids_K, values_K in zip(rows, ids_NK, values_NK, strict=True):
        # llama.cpp's JSON library writes null for NaN. Rounding may lift a certain token just above 0.
        for value in row.values():
            if value is None or not value <= 1e-3:
                raise Refusal(
                    f"teacher.endpoint.url={url}: it told {value} for a log-probability; its weights or its precision "
                    f"are broken"
                )
        likely = [(value, token) for token, value in row.items() if value is not None and value > MINUS_INFINITY]
        likely = sorted(likely, key=lambda entry: -entry[0])[:width]
        ids_K[: len(likely)] = [token for _, token in likely]
        values_K[: len(likely)] = [value for value, _ in likely]
    return ids_NK, values_NK


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def _told(ids: list[int] | None, told: Any, read: Callable[[Any], tuple[int | None, float]]) -> list[float] | None:
    """The log-probabilities of the tokens of an answer, or None where not all of them, or those of others, are told."""
    if ids is None or not isinstance(told, list) or len(told) != len(ids):
        return None
    try:
        pairs = [read(one) for one in told]
        values = [float(value) for _, value in pairs]
    except (KeyError, TypeError, ValueError):
        return None
    same = all(name in (None, token) for (name, _), token in zip(pairs, ids, strict=True))
    return values if same and all(map(math.isfinite, values)) else None


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _message(response: httpx.Response) -> str:
    """The server's own words, on one line: {"error": {"message"}}, {"error"}, {"message"} or {"detail"}."""
    try:
        told = response.json()
        if isinstance(told, dict):
            told = told.get("error", told)
        if isinstance(told, dict):
            told = told.get("message", told.get("detail", told))
    except ValueError:
        told = response.text
    return " ".join(str(told).split())[:300] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float:
    """Seconds, from a number or a date; 0 without."""
    told = response.headers.get("Retry-After", "")
    try:
        seconds = float(told)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(told).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER_SECONDS) if math.isfinite(seconds) else 0.0
