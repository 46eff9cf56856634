"""The kubelet's HTTPS API, as far as the API server passes it on: logs and exec."""

from __future__ import annotations

import ssl
import threading
import urllib.parse
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.cluster.bench.kubelet import logfile
from tests.cluster.bench.kubelet.container import Container
from tests.cluster.bench.kubelet.logfile import LogOptions
from tests.cluster.bench.kubelet.pod import PodRun
from tests.cluster.bench.kubelet.websocket import serve_exec

FindPod = Callable[[str, str], PodRun | None]


def serve(find_pod: FindPod, certificate: Path, key: Path, client_authority: Path) -> int:
    """Serves on a port of 127.0.0.1 that it returns, to clients of the control plane's authority only.

    ``find_pod`` takes namespace and name.
    """
    handler = type("Handler", (_Handler,), {"find_pod": staticmethod(find_pod)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(client_authority))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(certificate, key)
    # The handshake is left to the connection's thread, so that a silent client does not hold the others up.
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_address[1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    find_pod: FindPod

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(address.query, keep_blank_values=True)
        match address.path.strip("/").split("/"):
            case ["containerLogs" | "exec" as what, namespace, pod, container]:
                run = self.find_pod(namespace, pod)
                found = run.container(container) if run else None
                if run is None or found is None:
                    self._reply(404, f"no pod {namespace}/{pod} with a container {container!r} here\n")
                elif what == "exec":
                    serve_exec(self, run, found, query)
                else:
                    self._logs(found, {name: values[0] for name, values in query.items()})
            case _:
                self._reply(404, f"no {address.path}\n")

    do_POST = do_GET  # noqa: N815 - the base class's name

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def _logs(self, container: Container, query: dict[str, str]) -> None:
        number = container.num_restarts - (query.get("previous") == "true")
        # Until a restarted container runs again, its log is that of the last run.
        if "waiting" in container.state and number > 0 and query.get("previous") != "true":
            number -= 1
        if number < 0:
            self._reply(400, f"previous terminated container {container.name!r} not found\n")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in logfile.read(container.log(number), LogOptions.of(query), container.ended):
            self._chunk(piece)
        self._chunk(b"")

    def _chunk(self, content: bytes) -> None:
        self.wfile.write(b"%x\r\n%s\r\n" % (len(content), content))
        self.wfile.flush()

    def _reply(self, code: int, text: str) -> None:
        content = text.encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
