"""A proxy between a client and the API server that misbehaves on demand; what it forwards, it forwards whole.

It holds the API server's own certificate and forwards who the client is only where that is said by a token;
whoever comes without one is the bench's administrator.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import urllib3
import yaml

from tests.cluster.bench.api import Api

_HOP_BY_HOP = {"connection", "host", "transfer-encoding", "content-length"}


@dataclass(slots=True)
class Fault:
    """How the next requests are treated that ``method`` fits (None: all).

    ``kind``: ``429``, ``500``, ``502``, ``503`` and so on (a status without an API object), ``html`` (a page
    with status 200), ``reset`` (the connection is broken off), ``delay`` (half a second, then nothing wrong),
    ``cut`` (the answer breaks off in the middle).
    """

    kind: str
    after: bool = False
    """Whether the request is carried out first."""
    method: str | None = None
    times: int = 1


class Proxy:
    """Serves until ``close``; ``kubeconfig`` is one of an administrator who comes through here."""

    def __init__(self, api: Api, folder: Path, body: Callable[[str], str] | None = None) -> None:
        """
        Args:
            api: where requests go.
            folder: the bench's, which has the certificates.
            body: makes the page of a fault from the request's Authorization header.
        """
        self.faults: list[Fault] = []
        self.num_injected = 0
        self.requests: list[tuple[str, str]] = []
        """Method and path with its query, of every request so far."""
        self._lock = threading.Lock()
        self._body = body or (lambda _: "made to fail")
        pki = folder / "pki"
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pki / "kube-apiserver.crt", pki / "kube-apiserver.key")
        self.upstream = api.url
        self.pool_of_admin = api._pool
        # Not the administrator's connections: a client's certificate would go before the token.
        self.pool_of_tokens = urllib3.PoolManager(
            ssl_context=ssl.create_default_context(cafile=str(pki / "ca.crt")), maxsize=32, retries=False
        )
        proxy = self

        class Handler(_Handler):
            server_proxy = proxy

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.context = context
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self.url = f"https://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def kubeconfig(self, path: Path, of: Path) -> Path:
        """A copy of a kubeconfig that comes through here."""
        document = yaml.safe_load(of.read_text())
        document["clusters"][0]["cluster"]["server"] = self.url
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(document))
        return path

    def fault(self, method: str) -> Fault | None:
        """The fault that meets this request."""
        with self._lock:
            found = next((f for f in self.faults if f.method in (None, method)), None)
            if found is not None:
                self.num_injected += 1
                found.times -= 1
                if found.times <= 0:
                    self.faults.remove(found)
            return found

    def page(self, authorization: str) -> bytes:
        return self._body(authorization).encode()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    context: ssl.SSLContext

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        """In the thread of the connection, so that a slow handshake holds up nobody else."""
        with contextlib.suppress(OSError):
            secure = self.context.wrap_socket(request, server_side=True)
            self.RequestHandlerClass(secure, client_address, self)  # type: ignore[arg-type]

    def handle_error(self, *_: object) -> None:
        """Clients that go away are what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server_proxy: Proxy
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else None
        self.server_proxy.requests.append((self.command, self.path))
        fault = self.server_proxy.fault(self.command)
        if fault is not None and fault.kind == "delay":
            time.sleep(0.5)
            fault = None
        if fault is None:
            self._forward(body, cut=False)
        elif fault.kind == "cut":
            self._forward(body, cut=True)
        else:
            if fault.after:
                with contextlib.suppress(urllib3.exceptions.HTTPError):
                    self._ask(body).drain_conn()
            self._misbehave(fault.kind)

    do_POST = do_PATCH = do_DELETE = do_PUT = do_GET  # noqa: N815

    def _ask(self, body: bytes | None) -> urllib3.BaseHTTPResponse:
        proxy = self.server_proxy
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP_BY_HOP}
        pool = proxy.pool_of_tokens if "authorization" in map(str.lower, headers) else proxy.pool_of_admin
        timeout = urllib3.Timeout(connect=2, read=300)
        return pool.request(
            self.command, proxy.upstream + self.path, body=body, headers=headers, preload_content=False,
            decode_content=False, retries=False, timeout=timeout,
        )  # fmt: skip

    def _forward(self, body: bytes | None, *, cut: bool) -> None:
        self.close_connection = True  # one request a connection: what breaks, breaks for one
        try:
            answer = self._ask(body)
        except urllib3.exceptions.HTTPError:
            self._break_off()
            return
        try:
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                if name.lower() not in _HOP_BY_HOP or (name.lower() == "content-length" and not cut):
                    self.send_header(name, value)
            if cut:
                self.send_header("Content-Length", "1000000")
            self.send_header("Connection", "close")
            self.end_headers()
            while piece := answer.read1(2**16):
                self.wfile.write(piece[: len(piece) // 2] if cut else piece)
                self.wfile.flush()
                if cut:
                    break
        except (OSError, urllib3.exceptions.HTTPError):
            self._break_off()
        finally:
            answer.close()

    def _misbehave(self, kind: str) -> None:
        if kind == "reset":
            self._break_off()
            return
        page = self.server_proxy.page(self.headers.get("Authorization", ""))
        if kind == "html":
            page = f"<html><body>{page.decode()}</body></html>".encode()
        self.send_response(200 if kind == "html" else int(kind))
        if kind == "429":
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def _break_off(self) -> None:
        """A linger of no seconds makes the kernel send RST."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
