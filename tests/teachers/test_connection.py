"""Servers that answer without end, too much, or from elsewhere; and addresses that hold a key."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

import models.teachers.connection
from models.errors import Refusal
from models.teachers.endpoint import Endpoint

MODELS = json.dumps({"data": [{"id": "tiny", "owned_by": "vllm"}]}).encode()
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Type: application/json\r\n"


def dripping(first: bytes) -> Callable[[socket.socket, str], None]:
    """What begins at once, and then goes on by a byte in 50 ms for ever."""

    def answer(connection: socket.socket, path: str) -> None:
        connection.sendall(first)
        for _ in itertools.count():
            time.sleep(0.05)
            connection.sendall(b"x")

    return answer


def without_end(connection: socket.socket, path: str) -> None:
    connection.sendall(HEAD + b"\r\n")
    while True:
        connection.sendall(b" " * 2**20)


def bomb(connection: socket.socket, path: str) -> None:
    """20 MiB of blanks in a few KiB."""
    packed = gzip.compress(b" " * (20 * 2**20), 1)
    connection.sendall(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)


def moved(connection: socket.socket, path: str) -> None:
    where = b"http://me:word@elsewhere.example/v1/models?token=SECRET"
    connection.sendall(
        b"HTTP/1.1 307 Moved\r\nConnection: close\r\nLocation: " + where + b"\r\nContent-Length: 0\r\n\r\n"
    )


def two_models(connection: socket.socket, path: str) -> None:
    body = json.dumps({"data": [{"id": "tiny", "owned_by": "vllm"}, {"id": "large"}]}).encode()
    connection.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)


class Odd:
    """A server of one kind of answer, and how much of it was taken."""

    def __init__(self, answer: Callable[[socket.socket, str], None]) -> None:
        self.answer, self.asked, self.heads = answer, 0, []
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.one, args=(connection,), daemon=True).start()

    def one(self, connection: socket.socket) -> None:
        with connection:
            head = connection.recv(65536).decode()
            self.asked += 1
            self.heads.append(head)
            with contextlib.suppress(OSError):  # the client has left
                self.answer(connection, head.split()[1])


@pytest.fixture
def serving() -> Iterator[Callable[..., tuple[Odd, Endpoint]]]:
    made: list[Odd] = []

    def start(answer: Callable[[socket.socket, str], None], **values: Any) -> tuple[Odd, Endpoint]:
        server = Odd(answer)
        made.append(server)
        return server, Endpoint(
            f"http://127.0.0.1:{server.port}/v1", **{"retries": 0, "timeout_seconds": 0.4, **values}
        )

    yield start
    for server in made:
        server.listening.close()


@pytest.mark.parametrize(
    "first",
    [b"HTTP/1.1 200 OK\r\nX-Long: ", HEAD + b"\r\n", HEAD + b"Content-Length: 9999\r\n\r\n"],
    ids=["in its head", "in a body without a length", "in a body with one"],
)
def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline_of_the_whole_request(
    first: bytes, serving: Any
) -> None:
    _, endpoint = serving(dripping(first))
    begin = time.monotonic()
    with pytest.raises(Refusal, match=r"no answer within teacher\.endpoint\.timeout_seconds=0\.4"):
        endpoint.ask()
    assert 0.35 < time.monotonic() - begin < 5  # 0.4 s, on a busy machine


@pytest.mark.parametrize("answer", [without_end, bomb])
def test_a_body_beyond_its_bound_is_refused_and_not_tried_again(answer: Any, serving: Any) -> None:
    server, endpoint = serving(answer, retries=3, timeout_seconds=60, answer_mb=3)
    with pytest.raises(Refusal, match=r"^teacher\.endpoint\.answer_mb=3: an answer of http.* is longer; .*raise it$"):
        endpoint.ask()
    assert server.asked == 1


def test_a_redirect_is_told_and_not_followed_and_what_it_holds_is_not_said(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "mine")
    server, endpoint = serving(moved)
    with pytest.raises(
        Refusal, match=r"it answers 307 and sends on to http://elsewhere\.example/v1/models, which is n"
    ):
        endpoint.ask()
    with pytest.raises(Refusal, match="sends on to http://elsewhere") as refused:
        list(replace(endpoint, dialect="vllm", model="m").score([(0, [1, 2])]))
    assert not any(word in str(refused.value) for word in ("SECRET", "me:", "word"))
    assert server.asked == 2
    assert "Bearer mine" in server.heads[0]


def test_it_is_asked_once_in_a_short_time_before_a_run(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.teachers.endpoint, "REACH_SECONDS", 0.3)
    server, endpoint = serving(dripping(HEAD), retries=6, timeout_seconds=120)
    with pytest.raises(
        Refusal, match=r": no answer within the 0\.3 s that the check gives it; start the server or cor"
    ):
        endpoint.reach(scores=True)
    assert server.asked == 1
    with pytest.raises(Refusal, match=r": no answer \(no answer within teacher\.endpoint\.timeout_seconds=0\.2\); sta"):
        replace(endpoint, timeout_seconds=0.2).reach(scores=True)


def test_a_model_that_the_server_does_not_list_is_refused_with_those_it_does(serving: Any) -> None:
    _, endpoint = serving(two_models, timeout_seconds=60)
    assert endpoint.reach(scores=False).model == "tiny"
    assert replace(endpoint, model="large").reach(scores=False).model == "large"
    with pytest.raises(Refusal, match=r"^teacher\.endpoint\.model=big: http\S+ serves tiny, large; name one of them$"):
        replace(endpoint, model="big").reach(scores=False)


@pytest.mark.parametrize(
    "url",
    [
        "http://me:SECRET@host/v1",
        "http://SECRET@host/v1",
        "https://host/v1?api_key=SECRET",
        "https://host/v1?anything=SECRET",
        "https://host/v1#SECRET",
        "htp:/me:SECRET@host",  # no url at all
    ],
)
def test_an_address_with_a_key_in_it_is_refused_without_saying_it(url: str) -> None:
    with pytest.raises(Refusal, match=r"the key in the environment variable that .*api_key_variable names$") as refused:
        Endpoint(url).check()
    assert "SECRET" not in str(refused.value)
