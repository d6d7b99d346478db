"""The HTTP connections of one call to a served teacher: requests that are tried again, and what a rejection means."""

from __future__ import annotations

import email.utils
import logging
import math
import os
import random
import re
import time
from threading import Event
from typing import Any

import httpx

from models.errors import Refusal
from models.teachers.deadline import Deadline

FIRST_PAUSE_SECONDS = 1.0  # doubles with every further try
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_RETRY_AFTER_SECONDS = 600.0  # a server may ask for more patience than we have by ourselves, not for a day
LONGEST_MESSAGE_BYTES = 2**16  # read of an answer that is none
TRANSIENT = {408, 425, 429} | set(range(500, 600)) - {501, 505}

log = logging.getLogger(__name__)


class Unanswered(Exception):
    """A request that failed in a way that may pass, more often than `retries` allows; `late`: its time ran out."""

    def __init__(self, reason: str, late: bool = False) -> None:
        super().__init__(reason)
        self.late = late


class Rejected(Exception):
    """The server understood and said no, or (`moved`) named another address, which is never asked by itself."""

    def __init__(self, status: int, message: str, moved: str = "") -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message, self.moved = status, message, moved


class Connection:
    """What the threads of one call share. `model` and `dialect` are empty until they are found out.

    The arguments are teacher.endpoint's, which its messages name.
    """

    def __init__(
        self,
        url: str,
        *,
        top_k: int,
        concurrency: int,
        retries: int,
        timeout_seconds: int | float,
        answer_mb: int,
        api_key_variable: str,
    ) -> None:
        self.url, self.top_k, self.retries, self.timeout_seconds = url, top_k, retries, timeout_seconds
        self.answer_mb, self.api_key_variable = answer_mb, api_key_variable
        self.base = url.rstrip("/")
        self.root = self.base.removesuffix("/v1")
        self.model = self.dialect = ""
        self.stopped = Event()
        self.warned = -math.inf  # when a failed try was last reported
        key = os.environ.get(api_key_variable, "")
        self.client = httpx.Client(
            timeout=float(timeout_seconds),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )
        self.deadline = Deadline()
        self.deadline.bind(self.client)

    def close(self) -> None:
        self.client.close()

    def request(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a GET, or to a POST of `body`. Raises Unanswered, Rejected."""
        tries = self.retries + 1
        reason, late = "stopped", False
        for attempt in range(tries):
            if self.stopped.is_set():
                break
            asked_to_wait, late = 0.0, False
            try:
                with self.deadline.of(self.timeout_seconds):
                    response = self._exchange("GET" if body is None else "POST", url, body)
            except httpx.TimeoutException:
                late = True
                reason = f"no answer within teacher.endpoint.timeout_seconds={self.timeout_seconds:g}"
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
                    moved = response.headers.get("Location", "") if response.is_redirect else ""
                    raise Rejected(response.status_code, _message(response), moved)
            if attempt + 1 == tries:
                break
            # With jitter, or all that failed together would come back together.
            pause = min(FIRST_PAUSE_SECONDS * 2**attempt, LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
            pause = max(pause, asked_to_wait)
            if time.monotonic() - self.warned > 10:  # once, not once a thread
                self.warned = time.monotonic()
                log.warning("teacher.endpoint.url=%s: %s; trying again in %.0f s", self.url, reason, pause)
            if self.stopped.wait(pause):
                break
        raise Unanswered(reason, late)

    def _exchange(self, method: str, url: str, body: dict[str, Any] | None) -> httpx.Response:
        """A response that is read, of `answer_mb` at most. What is sent compressed counts as it is decompressed."""
        with self.client.stream(method, url, json=body) as response:
            room = self.answer_mb * 2**20 if response.is_success else LONGEST_MESSAGE_BYTES
            parts: list[bytes] = []
            for part in response.iter_bytes():
                room -= len(part)
                if room < 0 and response.is_success:
                    raise Refusal(
                        f"teacher.endpoint.answer_mb={self.answer_mb}: an answer of {self.url} is longer; ask for less "
                        f"(teacher.endpoint.top_k, data.max_length), or raise it"
                    )
                parts.append(part)
                if room < 0:
                    break
            headers = {n: v for n, v in response.headers.items() if n not in ("content-encoding", "content-length")}
            return httpx.Response(response.status_code, headers=headers, content=b"".join(parts))

    def post(self, url: str, body: dict[str, Any]) -> Any:
        """`request` for answers that are needed: what the server rejects is a Refusal with the remedy."""
        try:
            return self.request(url, body)
        except Rejected as problem:
            raise self.refusal(problem) from None

    def refusal(self, problem: Rejected) -> Refusal:
        message = problem.message
        if problem.moved:
            return Refusal(
                f"teacher.endpoint.url={self.url}: it answers {problem.status} and sends on to "
                f"{_address(problem.moved)}, which is not followed; if that is your server, give its address"
            )
        said = f"teacher.endpoint.url={self.url}: the server says {problem.status}: {message}"
        if problem.status in (401, 403):
            return Refusal(f"{said}; set the environment variable {self.api_key_variable} to its key")
        if problem.status == 404:
            return Refusal(
                f"{said}; see teacher.endpoint.model={self.model} and teacher.endpoint.url, which ends in /v1"
            )
        if "logprobs" in message and (limit := re.search(r"(?:max|at most|or equal to|up to)\D*(\d+)", message)):
            return Refusal(
                f"teacher.endpoint.top_k={self.top_k}: the server says {problem.status}: {message}; set "
                f"teacher.endpoint.top_k={limit[1]}, or start vLLM with --max-logprobs {self.top_k}"
            )
        if re.search(r"context (size|length)|max_model_len|longer than the maximum", message):
            return Refusal(
                f"{said}; a piece of T tokens needs room for T+1: shorten the pieces or serve a longer context"
            )
        return Refusal(said)

    def unusable(self, what: str) -> Refusal:
        return Refusal(f"teacher.endpoint.url={self.url} (dialect {self.dialect or 'auto'}): {what}")

    def look(self, url: str) -> dict[str, Any]:
        """What is there, or nothing: a server that lacks the page is of another kind."""
        try:
            answer = self.request(url)
        except Rejected as problem:
            if problem.status in (401, 403) or (problem.moved and url.startswith(f"{self.base}/")):
                raise self.refusal(problem) from None
            return {}
        return answer if isinstance(answer, dict) else {}


def _address(url: str) -> str:
    """Without what may be a secret."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        return "another address"
    return str(parsed.copy_with(userinfo=b"", query=None, fragment=None))


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
