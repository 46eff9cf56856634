"""A small API server over real HTTP that also misbehaves: refuses, drops, answers late, forgets versions."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from launcher.profiles import Profile

TOKEN = "stub-token-0123456789abcdef"  # noqa: S105


@dataclass
class Fault:
    """What happens to the next requests that match, instead of or after carrying them out."""

    method: str
    path: str
    status: int = 500
    body: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    times: int = 1
    carried_out: bool = False
    drop: bool = False
    """Close the connection without an answer."""


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: Any


class KubernetesStub:
    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.logs: dict[str, list[tuple[str, str]]] = {}
        """A pod's lines with their times; followers see what is appended."""
        self.ended_logs: set[str] = set()
        self.cut_log_after_bytes: int | None = None
        """The next log answer is cut there."""
        self.changes: list[tuple[int, str, str, dict[str, Any]]] = []
        self.oldest_version = 0
        self.version = 1
        self.watches_cut = 0
        self.on_request: Callable[[Request], None] | None = None
        self.lock = threading.RLock()
        self.connections: set[socket.socket] = set()
        self._server: ThreadingHTTPServer | None = None
        self._port = 0

    # -- life

    def start(self) -> None:
        stub = self

        class Handler(_Handler):
            server_stub = stub

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self.watches_cut += 1
            self._server.shutdown()
            self._server.server_close()
            self._server = None
            for connection in list(self.connections):
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def profile(self, folder: Path, **changes: Any) -> Profile:
        """A profile whose kubeconfig lies in ``folder``."""
        path = folder / "kubeconfig"
        write_kubeconfig(path, self.url, {"token": TOKEN})
        defaults: dict[str, Any] = {
            "name": "lab", "backend": "kubernetes", "kubeconfig": path, "namespace": "lab",
        }  # fmt: skip
        return Profile(**(defaults | changes))

    # -- objects

    def put(self, path: str, item: dict[str, Any]) -> dict[str, Any]:
        """Create or replace the object at ``path``."""
        with self.lock:
            self.version += 1
            kind = "MODIFIED" if path in self.objects else "ADDED"
            item.setdefault("metadata", {})
            item.setdefault("kind", _kind(path))
            item["metadata"]["name"] = path.rpartition("/")[2]
            item["metadata"]["resourceVersion"] = str(self.version)
            item["metadata"].setdefault("uid", f"uid-{self.version}")
            item["metadata"].setdefault("creationTimestamp", "2026-02-21T09:30:00Z")
            self.objects[path] = item
            self.changes.append((self.version, kind, path, json.loads(json.dumps(item))))
            return item

    def remove(self, path: str) -> None:
        with self.lock:
            self.version += 1
            item = self.objects.pop(path)
            item["metadata"]["resourceVersion"] = str(self.version)
            self.changes.append((self.version, "DELETED", path, item))

    def forget_versions(self) -> None:
        """Older versions are gone, and every open watch is closed."""
        with self.lock:
            self.version += 1
            self.oldest_version = self.version
            self.watches_cut += 1

    def fail(self, method: str, path: str, **what: Any) -> None:
        self.faults.append(Fault(method, path, **what))

    def count(self, method: str, path: str) -> int:
        return sum(r.method == method and re.search(path, r.path) is not None for r in self.requests)

    def items(self, collection: str, query: dict[str, str]) -> list[dict[str, Any]]:
        found = [
            item for path, item in self.objects.items()
            if re.fullmatch(rf"{re.escape(collection)}/[^/]+", path)
        ]  # fmt: skip
        return [item for item in found if _selected(item, query.get("labelSelector", ""))]


def _kind(path: str) -> str:
    """Of an object that a test puts there without one."""
    plural = path.split("/")[-2]
    return plural.removesuffix("es" if plural.endswith("sses") else "s").capitalize()


def _selected(item: dict[str, Any], selector: str) -> bool:
    labels = item["metadata"].get("labels", {})
    for term in filter(None, selector.split(",")):
        key, equals, value = term.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def write_kubeconfig(path: Path, server: str, user: dict[str, Any], **cluster: Any) -> Path:
    document = {
        "apiVersion": "v1", "kind": "Config", "current-context": "lab",
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "ada"}}],
        "clusters": [{"name": "lab", "cluster": {"server": server, **cluster}}],
        "users": [{"name": "ada", "user": user}],
    }  # fmt: skip
    path.write_text(yaml.safe_dump(document))
    return path


def status(code: int, reason: str, message: str, **details: Any) -> dict[str, Any]:
    return {
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": message, "details": details,
    }  # fmt: skip


class _Handler(BaseHTTPRequestHandler):
    server_stub: KubernetesStub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server_stub.connections.add(self.request)

    def finish(self) -> None:
        self.server_stub.connections.discard(self.request)
        with suppress(OSError):
            super().finish()

    def handle(self) -> None:
        with suppress(OSError):  # a client that went away
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle("GET")

    def do_POST(self) -> None:
        self._handle("POST")

    def do_PATCH(self) -> None:
        self._handle("PATCH")

    def do_DELETE(self) -> None:
        self._handle("DELETE")

    def _handle(self, method: str) -> None:
        stub = self.server_stub
        length = int(self.headers.get("Content-Length") or 0)
        raw = self.rfile.read(length)
        parts = urlsplit(self.path)
        request = Request(
            method, parts.path, {key: values[0] for key, values in parse_qs(parts.query).items()},
            dict(self.headers), json.loads(raw) if raw else None,
        )  # fmt: skip
        with stub.lock:
            stub.requests.append(request)
            fault = next(
                (f for f in stub.faults if f.method == method and re.search(f.path, request.path)), None
            )
            if fault is not None:
                fault.times -= 1
                if not fault.times:
                    stub.faults.remove(fault)
        if stub.on_request is not None:
            stub.on_request(request)
        if fault is None:
            self._answer(request)
            return
        if fault.carried_out:
            self._outcome(request)
        if fault.drop:
            self.close_connection = True
            return
        self._send(fault.status, fault.body, fault.headers)

    def _answer(self, request: Request) -> None:
        if request.query.get("watch"):
            self._watch(request)
        elif request.path.endswith("/log"):
            self._log(request)
        else:
            self._send(*self._outcome(request))

    def _outcome(self, request: Request) -> tuple[int, Any]:
        stub, path = self.server_stub, request.path
        with stub.lock:
            if request.method == "GET":
                if path in stub.objects:
                    return 200, stub.objects[path]
                if len(path.strip("/").split("/")) % 2 == (1 if path.startswith("/apis") else 0):
                    return 404, status(404, "NotFound", f"{path.rpartition('/')[2]!r} not found")
                listed = {"resourceVersion": str(stub.version)}
                return 200, {"kind": "List", "metadata": listed, "items": stub.items(path, request.query)}
            if request.method == "POST":
                name = request.body.get("metadata", {}).get("name")
                if name is None:
                    return 201, request.body | {"status": {"allowed": True}}
                if f"{path}/{name}" in stub.objects:
                    return 409, status(409, "AlreadyExists", f"{name!r} already exists")
                return 201, stub.put(f"{path}/{name}", request.body)
            if path not in stub.objects:
                return 404, status(404, "NotFound", "not found")
            item = stub.objects[path]
            wanted = request.body.get("metadata", {}).get("resourceVersion")
            if wanted is not None and wanted != item["metadata"]["resourceVersion"]:
                return 409, status(409, "Conflict", "the object has been modified")
            return 200, stub.put(path, _merged(item, request.body))

    def _send(self, code: int, body: Any, headers: dict[str, str] | None = None) -> None:
        content = body.encode() if isinstance(body, str) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _watch(self, request: Request) -> None:
        stub = self.server_stub
        seen = int(request.query["resourceVersion"])
        cut, end = stub.watches_cut, time.monotonic() + int(request.query["timeoutSeconds"])
        self._begin_stream()
        if seen < stub.oldest_version:
            gone = {"type": "ERROR", "object": status(410, "Expired", "too old resource version")}
            self._chunk(json.dumps(gone).encode() + b"\n")
        else:
            while stub.watches_cut == cut and time.monotonic() < end:
                with stub.lock:
                    new = [change for change in stub.changes if change[0] > seen]
                for version, kind, path, item in new:
                    seen = version
                    if path.rpartition("/")[0] == request.path and _selected(
                        item, request.query.get("labelSelector", "")
                    ):
                        self._chunk(json.dumps({"type": kind, "object": item}).encode() + b"\n")
                time.sleep(0.01)
        self._end_stream()

    def _log(self, request: Request) -> None:
        stub, pod = self.server_stub, request.path.split("/")[-2]
        if pod not in stub.logs:
            self._send(404, status(404, "NotFound", f"pods {pod!r} not found"))
            return
        since = request.query.get("sinceTime", "")[:19]
        limit, stub.cut_log_after_bytes = stub.cut_log_after_bytes, None
        self._begin_stream()
        sent = position = 0
        cut = stub.watches_cut
        lines = stub.logs[pod]  # a stream that is open goes on to its end also when the pod is removed
        while True:
            has_ended = pod in stub.ended_logs  # asked first: what was written before the end is sent
            new = lines[position:]
            for at, text in new:
                if at[:19] < since:
                    continue
                line = f"{at} {text}\n" if request.query.get("timestamps") else f"{text}\n"
                piece = line.encode()
                if limit is not None and sent + len(piece) > limit:
                    self._chunk(piece[: limit - sent])
                    self.close_connection = True
                    return  # without the last chunk: cut off
                sent += len(piece)
                self._chunk(piece)
            position += len(new)
            if not request.query.get("follow") or has_ended or stub.watches_cut != cut:
                break
            time.sleep(0.01)
        self._end_stream()

    def _begin_stream(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        if data:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


def _merged(item: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    result = dict(item) if isinstance(item, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result


@contextmanager
def running_stub() -> Iterator[KubernetesStub]:
    stub = KubernetesStub()
    stub.start()
    try:
        yield stub
    finally:
        stub.stop()
