"""An S3 server over HTTP in a thread of its own, and a place to stand between it and its clients.

The server is ministack's S3: it checks SHA-256 and MD5 of what arrives and knows If-None-Match.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("SERVICES", "s3")
logging.disable(logging.INFO)
from hypercorn.asyncio import serve  # noqa: E402
from hypercorn.config import Config  # noqa: E402
from ministack.app import app  # noqa: E402

logging.disable(logging.NOTSET)
logging.getLogger().setLevel(logging.WARNING)  # its import sets it to INFO

REGION = "us-east-1"
ACCESS_KEY = "AKIAQ7TESTACCESSKEY1"
SECRET_KEY = "wJalrXUtnFEMIK7MDENGbPxRfiCYzSecret"  # noqa: S105


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str:
        """Below ``/bucket/folder/run/``."""
        return "/".join(self.path.split("/")[4:])

    @property
    def changes(self) -> bool:
        return self.method in ("PUT", "DELETE", "POST")


@dataclass(frozen=True)
class Answer:
    """An answer of ours in place of the server's."""

    status: int
    code: str = ""
    message: str = "no"

    @property
    def body(self) -> bytes:
        return f"<Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()


@dataclass
class Between:
    """What happens to requests; a test sets the hooks."""

    before: Callable[[Request], Answer | Request | None] = lambda request: None
    """An answer instead of the server's, another request for the server, or nothing. May block: each request
    has a thread."""
    after: Callable[[Request], Answer | None] = lambda request: None
    """When the server has done its work, before the client hears of it."""
    requests: list[Request] = field(default_factory=list)

    def clear(self) -> None:
        self.before = lambda request: None
        self.after = lambda request: None
        self.requests.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        request = Request(
            scope["method"],
            scope["path"],
            scope["query_string"].decode(),
            {name.decode().lower(): value.decode() for name, value in scope["headers"]},
            await _body(receive),
        )
        self.requests.append(request)
        answer = await asyncio.to_thread(self.before, request)
        if isinstance(answer, Request):
            request, answer = answer, None
        if answer is None:
            held: list[Any] = []
            headers = [(name.encode(), value.encode()) for name, value in request.headers.items()]
            await app({**scope, "headers": headers}, _replay(request.body), _append_to(held))
            answer = await asyncio.to_thread(self.after, request)
            if answer is None:
                for message in held:
                    await send(message)
                return
        start = {"type": "http.response.start", "status": answer.status, "headers": []}
        await send(start)
        await send({"type": "http.response.body", "body": answer.body})


async def _body(receive: Callable[[], Awaitable[Any]]) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return body


def _replay(body: bytes) -> Callable[[], Awaitable[Any]]:
    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    return receive


def _append_to(held: list[Any]) -> Callable[[Any], Awaitable[None]]:
    async def send(message: Any) -> None:
        held.append(message)

    return send


class S3Server:
    """Listens on a port of this machine until it is closed."""

    def __init__(self) -> None:
        self.between = Between()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        config = Config()
        config.bind = [f"fd://{self._socket.fileno()}"]
        config.errorlog = None
        config.h11_max_incomplete_size = 2**20
        config.max_app_queue_size = 100
        self._loop.run_until_complete(serve(self.between, config, shutdown_trigger=self._stop.wait))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": REGION,
            "NO_PROXY": "127.0.0.1",
        }
