"""One request to an API server and its answer; what goes wrong on the wire, in words of our own."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Any, TypeVar
from urllib.parse import urlencode

import urllib3
from urllib3 import exceptions

from launcher.backends.deadline import DeadlineError, within
from launcher.backends.kubernetes_connection import Connection
from launcher.backends.kubernetes_errors import ApiUnanswered, refusal
from launcher.backends.server_clock import ServerClock

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
ANSWER_S = 60.0
"""For one whole answer, however slowly it comes."""
ANSWER_BYTES = 2**28
"""Unpacked; every pod of a large cluster takes a tenth of it."""
_PIECE_BYTES = 2**16
_TRANSPORT_ERRORS = (exceptions.HTTPError, http.client.HTTPException, OSError)
_NOT_SENT = (exceptions.ConnectTimeoutError, exceptions.ProxyError, exceptions.SSLError)

Query = Mapping[str, str | int]
_T = TypeVar("_T")


class Transport:
    """Sends requests over a connection, each once."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.place = connection.place
        self.clock = ServerClock()

    def call(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        *,
        body: Any = None,
        content_type: str = "application/json",
    ) -> bytes:
        """The whole answer.

        Raises:
            ApiError: any answer but success, or none.
        """

        def answer() -> bytes:
            response = self._open(method, path, query, body=body, content_type=content_type, compressed=True)
            with _Closing(response):
                try:
                    return self._content(response)
                except _TRANSPORT_ERRORS as error:
                    raise _unanswered(self.place, error, sent=True) from None

        return self._in_time(answer)

    def pieces(
        self, path: str, query: Query, *, accept: str = "application/json", read_timeout_s: float
    ) -> Iterator[bytes]:
        """An answer as it comes, which may take long.

        The request is sent at once, not at the first piece.

        Args:
            read_timeout_s: the longest silence.

        Raises:
            ApiError: any answer but success, or none; ApiUnanswered also later, when the connection breaks.
        """
        response = self._in_time(
            lambda: self._open("GET", path, query, accept=accept, read_timeout_s=read_timeout_s)
        )

        def stream() -> Iterator[bytes]:
            with _Closing(response):
                try:
                    yield from response.stream(_PIECE_BYTES)
                except _TRANSPORT_ERRORS as error:
                    raise _unanswered(self.place, error, sent=True) from None

        return stream()

    def _open(
        self,
        method: str,
        path: str,
        query: Query | None,
        *,
        body: Any = None,
        content_type: str = "application/json",
        accept: str = "application/json",
        compressed: bool = False,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> Any:
        authorization = self._connection.authorization()
        headers = {"Accept": accept, "User-Agent": "influence-launcher", **authorization}
        if compressed:
            headers["Accept-Encoding"] = "gzip"
        if body is not None:
            headers["Content-Type"] = content_type
        url = self._connection.host + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = self._connection.pool.request(
                method, url, headers=headers, preload_content=False, retries=False, redirect=False,
                body=None if body is None else json.dumps(body).encode(),
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
            )  # fmt: skip
            self.clock.read(response.headers.get("Date"))
            if 200 <= response.status < 300:
                return response
            with _Closing(response):
                content = self._content(response)
        except _TRANSPORT_ERRORS as error:
            raise _unanswered(self.place, error, sent=False) from None
        retry_after = response.headers.get("Retry-After")
        content = _without_credentials(content, authorization)
        raise refusal(self.place, method, path, response.status, content, retry_after)

    def _content(self, response: Any) -> bytes:
        """All of an answer, whatever its header says of its size."""
        content = bytearray()
        ends_s = monotonic() + ANSWER_S
        for piece in response.stream(_PIECE_BYTES, decode_content=True):
            content += piece
            if len(content) > ANSWER_BYTES:
                told = ApiUnanswered(
                    f"{self.place} answered with more than {ANSWER_BYTES >> 20} MiB",
                    why="no answer that the launcher asks for is as large",
                    next_step="check the server's address in the kubeconfig; something else may answer there",
                )
                told.perhaps_done = told.hopeless = True
                raise told
            if monotonic() > ends_s:  # nobody waits any more
                raise DeadlineError
        return bytes(content)

    def _in_time(self, ask: Callable[[], _T]) -> _T:
        try:
            return within(ANSWER_S, ask)
        except DeadlineError:
            told = ApiUnanswered(
                f"{self.place} began to answer and did not end within {ANSWER_S:.0f} s",
                next_step="check the network (a VPN?), then try again; when it lasts, tell the administrator",
            )
        told.perhaps_done = True
        raise told


def _without_credentials(content: bytes, authorization: Mapping[str, str]) -> bytes:
    """An answer without what we sent to say who we are: a proxy's error page may repeat the request."""
    for value in authorization.values():
        credential = value.rpartition(" ")[2]
        for form in (credential, json.dumps(credential)[1:-1]):
            content = content.replace(form.encode(), b"***")
    return content


class _Closing:
    """Gives a response's connection back to the pool when it was read to the end, else closes it."""

    def __init__(self, response: Any) -> None:
        self._response = response

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        if self._response.closed:
            self._response.release_conn()
        else:
            self._response.close()


def _unanswered(place: str, error: BaseException, *, sent: bool) -> ApiUnanswered:
    """A connection that could not be made, or broke; not in the library's words, which may hold a URL.

    Args:
        sent: whether the request is known to have been sent; otherwise the kind of error decides.
    """
    told = ApiUnanswered(
        f"{place} cannot be reached",
        next_step="check the network (a VPN?) and the server's address in the kubeconfig, then try again",
    )
    told.perhaps_done = sent or not isinstance(error, _NOT_SENT)
    cause = error.__cause__ or error.__context__
    if isinstance(error, exceptions.SSLError):
        told.hopeless = True
        told.why = f"TLS: {_tls_reason(error)}"
        told.next_step = (
            "check the cluster's certificate-authority in the kubeconfig, and that nothing else answers there"
        )
    elif isinstance(error, exceptions.NameResolutionError) or isinstance(cause, socket.gaierror):
        told.why = "its name cannot be resolved"
    elif isinstance(error, exceptions.NewConnectionError):  # before the time-out, which is its base class
        told.why = "connection refused" if isinstance(cause, ConnectionRefusedError) else "no connection"
    elif isinstance(error, exceptions.ConnectTimeoutError):
        told.why = f"it did not answer within {CONNECT_TIMEOUT_S:.0f} s"
    elif isinstance(error, (exceptions.ReadTimeoutError, TimeoutError)):
        told.why = f"it took the request and then said nothing for {READ_TIMEOUT_S:.0f} s"
    elif isinstance(error, exceptions.ProxyError):
        told.why = "the proxy does not let us through"
    else:
        told.why = "the connection was closed in the middle"
    return told


def _tls_reason(error: BaseException) -> str:
    """OpenSSL's sentence; it holds names and reasons, no secrets."""
    for each in (error, error.__cause__, error.__context__, *error.args):
        if message := getattr(each, "verify_message", None):
            return f"certificate verify failed: {message}"
        if reason := getattr(each, "reason", None):
            return str(reason)
    return "no secure connection"
