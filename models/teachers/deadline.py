"""A deadline for the whole of an HTTP request, from connecting to the last byte of the answer."""

from __future__ import annotations

import math
import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpcore
import httpx


class Deadline(httpcore.NetworkBackend):
    """The time by which a thread's request has to be whole. httpx bounds the pause between two bytes alone, so that a
    server which sends one now and then is waited for without end."""

    def __init__(self) -> None:
        self._plain, self._thread = httpcore.SyncBackend(), threading.local()

    def bind(self, client: httpx.Client) -> None:
        """Let all that the client sends, through proxies too, go by this deadline."""
        found: list[Any] = [client._transport, *client._mounts.values()]
        for transport in found:
            if transport is not None:
                transport._pool._network_backend = self

    @contextmanager
    def of(self, seconds: int | float) -> Iterator[None]:
        """For the requests that this thread makes in the block."""
        self._thread.end = time.monotonic() + seconds
        try:
            yield
        finally:
            self._thread.end = math.inf

    def left(self, timeout: float | None) -> float | None:
        """Seconds for the next operation; 0 or less: there are none."""
        end = getattr(self._thread, "end", math.inf)
        left = end - time.monotonic()
        return timeout if left == math.inf else left if timeout is None else min(timeout, left)

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = self.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ConnectTimeout
        return _Stream(self._plain.connect_tcp(host, port, left, local_address, socket_options), self)


class _Stream(httpcore.NetworkStream):
    def __init__(self, plain: httpcore.NetworkStream, deadline: Deadline) -> None:
        self._plain, self._deadline = plain, deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = self._deadline.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ReadTimeout
        return self._plain.read(max_bytes, left)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        left = self._deadline.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.WriteTimeout
        self._plain.write(buffer, left)

    def close(self) -> None:
        self._plain.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        left = self._deadline.left(timeout)
        if left is not None and left <= 0:
            raise httpcore.ConnectTimeout
        return _Stream(self._plain.start_tls(ssl_context, server_hostname, left), self._deadline)

    def get_extra_info(self, info: str) -> Any:
        return self._plain.get_extra_info(info)
