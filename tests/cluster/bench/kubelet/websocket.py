"""Exec over a WebSocket: Kubernetes' protocols v4 and v5, in which a message's first byte is its channel."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import struct
import subprocess
import threading
from http.server import BaseHTTPRequestHandler
from typing import IO

from tests.cluster.bench.kubelet.container import Container
from tests.cluster.bench.kubelet.pod import PodRun

PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
_STDIN, _STDOUT, _STDERR, _STATUS, _CLOSE = 0, 1, 2, 3, 255  # channels; v5 closes the one in the next byte
_BINARY, _CLOSING, _PING, _PONG = 2, 8, 9, 10  # opcodes, RFC 6455 section 5.2
_ACCEPT_SUFFIX = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455 section 1.3
_NORMAL_CLOSURE = struct.pack(">H", 1000)


def serve_exec(
    handler: BaseHTTPRequestHandler, pod: PodRun, container: Container, query: dict[str, list[str]]
) -> None:
    """Runs ``command`` beside the container's process, with its environment, until it or the client ends."""
    offered = [word.strip() for word in handler.headers.get("Sec-WebSocket-Protocol", "").split(",")]
    protocol = next((name for name in PROTOCOLS if name in offered), None)
    if protocol is None or handler.headers.get("Upgrade", "").lower() != "websocket":
        handler.send_error(400, "exec is served over a WebSocket only")
        return
    socket = _Socket(handler, protocol)
    environment, _ = pod.process_environment(container)
    stdin = query.get("input", query.get("stdin", ["0"]))[0] in ("1", "true")
    try:
        with container.beside(query["command"], environment) as process:
            _carry(socket, process, stdin=stdin)
        status = _status(process.returncode)
    except OSError as error:
        status = {"metadata": {}, "status": "Failure", "reason": "InternalError", "message": str(error)}
    with contextlib.suppress(OSError):  # the client may have left
        socket.send(_STATUS, json.dumps(status).encode())
        socket.close()


def _carry(socket: _Socket, process: subprocess.Popen[bytes], *, stdin: bool) -> None:
    """Both ways, until the command has closed its outputs."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    if not stdin:
        process.stdin.close()
    threading.Thread(target=_feed, args=[socket, process], daemon=True).start()
    outputs = ((_STDOUT, process.stdout), (_STDERR, process.stderr))
    pumps = [threading.Thread(target=_pump, args=[socket, *output], daemon=True) for output in outputs]
    for pump in pumps:
        pump.start()
    for pump in pumps:
        pump.join()


def _status(code: int) -> dict[str, object]:
    """The metav1.Status of an exit."""
    if code == 0:
        return {"metadata": {}, "status": "Success"}
    code = code if code > 0 else 128 - code
    return {
        "metadata": {},
        "status": "Failure",
        "reason": "NonZeroExitCode",
        "message": f"command terminated with non-zero exit code: {code}",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def _pump(socket: _Socket, channel: int, output: IO[bytes]) -> None:
    descriptor = output.fileno()
    with contextlib.suppress(OSError):
        while piece := os.read(descriptor, 32_768):
            socket.send(channel, piece)


def _feed(socket: _Socket, process: subprocess.Popen[bytes]) -> None:
    """Passes on what the client sends, and hangs up on the command when the client leaves."""
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        while (message := socket.receive()) is not None:
            if message[:1] == bytes([_STDIN]):
                process.stdin.write(message[1:])
                process.stdin.flush()
            elif message == bytes([_CLOSE, _STDIN]):
                process.stdin.close()
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGHUP)


class _Socket:
    """The server's side of RFC 6455, as far as API servers use it."""

    def __init__(self, handler: BaseHTTPRequestHandler, protocol: str) -> None:
        self._read, self._write = handler.rfile, handler.wfile
        self._sending = threading.Lock()
        key = handler.headers["Sec-WebSocket-Key"] + _ACCEPT_SUFFIX
        accept = base64.b64encode(hashlib.sha1(key.encode(), usedforsecurity=False).digest()).decode()
        handler.send_response(101)
        handler.send_header("Upgrade", "websocket")
        handler.send_header("Connection", "Upgrade")
        handler.send_header("Sec-WebSocket-Accept", accept)
        handler.send_header("Sec-WebSocket-Protocol", protocol)
        handler.end_headers()
        handler.wfile.flush()
        handler.close_connection = True

    def send(self, channel: int, content: bytes) -> None:
        self._frame(_BINARY, bytes([channel]) + content)

    def close(self) -> None:
        self._frame(_CLOSING, _NORMAL_CLOSURE)

    def receive(self) -> bytes | None:
        """The next message, or None when there will be no more."""
        message = b""
        while len(head := self._read.read(2)) == 2:
            final, opcode = head[0] & 0x80, head[0] & 0x0F
            length = head[1] & 0x7F
            if length == 126:
                (length,) = struct.unpack(">H", self._read.read(2))
            elif length == 127:
                (length,) = struct.unpack(">Q", self._read.read(8))
            mask = self._read.read(4) if head[1] & 0x80 else bytes(4)
            content = bytes(byte ^ mask[i % 4] for i, byte in enumerate(self._read.read(length)))
            if opcode == _CLOSING:
                return None
            if opcode == _PING:
                self._frame(_PONG, content)
            elif opcode != _PONG:
                message += content
                if final:
                    return message
        return None

    def _frame(self, opcode: int, content: bytes) -> None:
        if len(content) < 126:
            length = bytes([len(content)])
        elif len(content) < 1 << 16:
            length = b"\x7e" + struct.pack(">H", len(content))
        else:
            length = b"\x7f" + struct.pack(">Q", len(content))
        with self._sending:
            self._write.write(bytes([0x80 | opcode]) + length + content)
            self._write.flush()
