"""One request to Run:ai and its answer, or why there is none.

What goes wrong is returned and not raised: exceptions of httpx hold the request with its token, and must not
be chained to anything that is shown.
"""

from __future__ import annotations

import socket
import ssl
import time
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.backends.deadline import DeadlineError, within
from launcher.errors import BackendError

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long and how often Run:ai is asked, and how much is read."""

    connect_s: float = 5.0
    read_s: float = 20.0
    """Between two pieces of an answer."""
    answer_s: float = 60.0
    """For one whole answer, however it trickles in."""
    num_tries: int = 5
    backoff_s: float = 0.5
    """The most that the first wait takes; doubles, at most `max_backoff_s`."""
    max_backoff_s: float = 8.0
    patience_s: float = 90.0
    """For one question with all its tries and waits."""
    answer_bytes: int = 32 * 2**20
    page_items: int = 500
    """The most that Run:ai gives in a page."""
    num_pages: int = 100


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered, whatever the status."""

    status: int
    retry_after: str | None
    content: bytes


@dataclass(frozen=True, slots=True)
class Failure:
    """Why no answer came."""

    reason: str
    next_step: str
    arrived: bool
    """Whether the request may have reached the server."""
    passing: bool
    """Whether another try may help."""


class Connection:
    """The HTTP connection to one control plane; opened by the first request, follows no redirects.

    Raises:
        BackendError: the address or ``ca_file`` cannot be used.
    """

    def __init__(self, url: str, ca_file: Path | None, limits: Limits) -> None:
        self.base = checked_url(url)
        self._ca_file = ca_file
        self._limits = limits
        self._http: httpx.Client | None = None

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        token: str | None = None,
    ) -> Answer | Failure:
        """One try.

        Raises:
            BackendError: no connection can be set up on this side (certificates, proxy).
        """
        if self._http is None:
            self._http = self._open()
        http = self._http
        try:
            return within(
                self._limits.answer_s,
                lambda: self._sent(http, method, path, query=query, body=body, token=token),
            )
        except DeadlineError:
            self._http = None  # what was left behind goes on with it
            return self._too_late()

    def _sent(
        self,
        http: httpx.Client,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None,
        body: Mapping[str, Any] | None,
        token: str | None,
    ) -> Answer | Failure:
        import httpx

        headers = {"Accept": "application/json"}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        ends_s = time.monotonic() + self._limits.answer_s
        try:
            with http.stream(
                method, self.base + path, params=dict(query or {}), json=body, headers=headers
            ) as response:
                content = bytearray()
                for piece in response.iter_bytes():
                    content += piece
                    if len(content) > self._limits.answer_bytes:
                        return Failure(
                            f"the answer is larger than {self._limits.answer_bytes} bytes",
                            "see whether the profile's runai.url is that of a control plane",
                            arrived=True, passing=False,
                        )  # fmt: skip
                    if time.monotonic() > ends_s:
                        return self._too_late()
                return Answer(response.status_code, response.headers.get("Retry-After"), bytes(content))
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            return self._explain(error)

    def _too_late(self) -> Failure:
        return Failure(
            f"the answer did not end within {self._limits.answer_s:g} s", "try again later",
            arrived=True, passing=True,
        )  # fmt: skip

    def _open(self) -> httpx.Client:
        import httpx

        problem = None
        if self._ca_file is not None:
            try:
                verify: bool | ssl.SSLContext = ssl.create_default_context(cafile=str(self._ca_file))
            except OSError as error:  # ssl.SSLError is one
                no_pem = isinstance(error, ssl.SSLError)
                problem = "it holds no certificates in PEM" if no_pem else error.strerror
            if problem is not None:
                raise BackendError(
                    f"the profile's runai.ca_file {self._ca_file} cannot be used",
                    why=problem,
                    next_step=f"give the file with the certificate authority of {self.base}, in PEM",
                )
        else:
            verify = True
        try:
            return httpx.Client(
                verify=verify,
                timeout=httpx.Timeout(self._limits.read_s, connect=self._limits.connect_s),
                follow_redirects=False,
                headers={"User-Agent": "influence-launcher"},
            )
        except (OSError, ValueError, ImportError):
            pass  # a proxy's address may hold a password: not shown
        raise BackendError(
            f"no connection to {self.base} can be set up",
            why="a certificate or proxy that the environment names cannot be used",
            next_step="check HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
        )

    def _explain(self, error: Exception) -> Failure:
        """An exception of httpx in words that hold nothing of the request."""
        import httpx

        if isinstance(error, httpx.ConnectError):
            return self._no_connection(error)
        if isinstance(error, httpx.ConnectTimeout):
            return Failure("no connection in time", self._reach(), arrived=False, passing=True)
        if isinstance(error, httpx.ProxyError):
            return Failure("the proxy refuses", "check HTTPS_PROXY and NO_PROXY", arrived=False, passing=True)
        if isinstance(error, httpx.TimeoutException):
            return Failure("no answer in time", "try again later", arrived=True, passing=True)
        if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError)):
            return Failure(
                "the request cannot be made", "check the profile's runai.url", arrived=False, passing=False
            )
        reason = (
            "the answer is damaged" if isinstance(error, httpx.DecodingError) else "the connection was lost"
        )
        return Failure(reason, "try again later", arrived=True, passing=True)

    def _no_connection(self, error: Exception) -> Failure:
        """httpx keeps the reason in what its own exception was raised from."""
        cause: BaseException | None = error
        reason, passing = "no connection", True
        for _ in range(10):
            if isinstance(cause, ssl.SSLCertVerificationError):
                trusted = "the system's" if self._ca_file is None else f"those of {self._ca_file}"
                return Failure(
                    f"its certificate is not trusted: {cause.verify_message} (trusted are {trusted})",
                    "set the profile's runai.ca_file to your site's certificate authority, in PEM",
                    arrived=False, passing=False,
                )  # fmt: skip
            if isinstance(cause, ssl.SSLError):
                reason, passing = "it does not speak TLS", False
            elif isinstance(cause, socket.gaierror):
                reason, passing = "no host of this name is known", cause.errno == socket.EAI_AGAIN
            elif isinstance(cause, ConnectionRefusedError):
                reason = "the connection is refused"
            cause = None if cause is None else cause.__cause__ or cause.__context__
        return Failure(reason, self._reach(), arrived=False, passing=passing)

    def _reach(self) -> str:
        return f"check the network, a VPN, and that the profile's runai.url is right: {self.base}"


def checked_url(url: str) -> str:
    """A control plane's address without a trailing slash, safe to send a secret to.

    Raises:
        BackendError: not https (plain http only to this machine), or more than scheme, host and port.
    """
    wrong = None
    try:
        parts = urllib.parse.urlsplit(url)
        local = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if "@" in url:
            wrong, url = "it holds a user or a password", "***"
        elif (
            not parts.hostname or parts.port == 0 or not url.isascii() or not url.isprintable() or " " in url
        ):
            wrong = "it names no host"
        elif parts.scheme != "https" and not (parts.scheme == "http" and local):
            wrong = "a secret is sent over https only"
        elif parts.query or parts.fragment or parts.path.strip("/"):
            wrong = "it has more than scheme, host and port"
    except ValueError:
        wrong = "it is no URL"
    if wrong is not None:
        raise BackendError(
            f"the profile's runai.url cannot be used: {url[:200]!a}",
            why=wrong,
            next_step="write the address of the control plane, such as https://lab.run.ai",
        )
    return url.rstrip("/")
