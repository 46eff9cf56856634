"""The supervisor of a control plane: ``python -m tests.cluster.bench.serve FOLDER SOCKET``.

Whoever uses the control plane holds a connection to its socket. When the last connection closes, all is
stopped, and the kernel closes those of a test process however that ends. Requests are lines of JSON,
``{"do": "kill_apiserver"}``, answered by ``{}`` or ``{"error": WORDS}``.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path

from tests.cluster.bench import programs
from tests.cluster.bench.controlplane import ControlPlane
from tests.cluster.bench.kubelet.container import POD_VARIABLE
from tests.cluster.bench.processes import kill_carrying

#: So long a first user may take to connect.
_FIRST_USER_S = 60.0


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # `finally` below stops everything
    control_plane = ControlPlane(programs.controlplane(), folder)
    users: list[socket.socket] = []
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(abstract(name))
            listener.listen()
            control_plane.start()
            users = serve(control_plane, listener)
    finally:
        control_plane.stop()
        kill_carrying(POD_VARIABLE, f"{folder}/")  # should the kubelet have died before it could
        for user in users:
            user.close()  # which is what the last user waits for


def abstract(name: str) -> str:
    """The address of a socket that has no file, so that no path is too long and nothing is left behind."""
    return f"\0{name}"


def serve(control_plane: ControlPlane, listener: socket.socket) -> list[socket.socket]:
    """Answers requests, all in this thread: the control plane's programs die with the one that started them.

    Returns:
        The last user's connection, to be closed when all is stopped.
    """
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    users: dict[socket.socket, bytes] = {}
    last: list[socket.socket] = []
    while True:
        ready = selector.select(_FIRST_USER_S)
        if not ready and not users:
            return last
        for key, _ in ready:
            if key.fileobj is listener:
                user, _ = listener.accept()
                users[user] = b""
                selector.register(user, selectors.EVENT_READ)
                continue
            assert isinstance(key.fileobj, socket.socket)
            user = key.fileobj
            received = b""
            with contextlib.suppress(OSError):
                received = user.recv(65_536)
            if received:
                *lines, users[user] = (users[user] + received).split(b"\n")
                for line in lines:
                    user.sendall(answer(control_plane, json.loads(line)))
                continue
            selector.unregister(user)
            del users[user]
            if not users:
                return [user]
            user.close()


def answer(control_plane: ControlPlane, request: dict[str, str]) -> bytes:
    try:
        match request["do"]:
            case "wait":
                pass  # whoever asks waited long enough: nothing is answered before everything is started
            case "kill_apiserver":
                control_plane.kill_apiserver()
            case "start_apiserver":
                control_plane.start_apiserver()
            case unknown:
                raise ValueError(f"no request {unknown!r}")
    except Exception as error:  # told to the test that asked, and the others go on
        traceback.print_exc()
        return json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n"
    return b"{}\n"


if __name__ == "__main__":
    main()
