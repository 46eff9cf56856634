"""The supervisor of a control plane: ``python -m tests.cluster.bench.serve FOLDER FD``.

FD is a socket to the process that uses the control plane. When it closes, and the kernel closes it however
that process ends, all is stopped. Requests are lines of JSON, ``{"do": "kill_apiserver"}``, and so are the
answers, ``{}`` or ``{"error": WORDS}``.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import traceback
from pathlib import Path

from tests.cluster.bench import programs
from tests.cluster.bench.controlplane import ControlPlane
from tests.cluster.bench.kubelet.container import POD_VARIABLE
from tests.cluster.bench.processes import adopt_orphans, kill_carrying


def main() -> None:
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # `finally` below stops everything
    adopt_orphans()
    control_plane = ControlPlane(programs.controlplane(), folder)
    try:
        with socket.socket(fileno=int(sys.argv[2])) as user, user.makefile("rw") as lines:
            control_plane.start()
            # All in this thread: the control plane's programs die with the one that started them.
            for line in lines:
                json.dump(answer(control_plane, json.loads(line)["do"]), lines)
                lines.write("\n")
                lines.flush()
    finally:
        control_plane.stop()
        kill_carrying(POD_VARIABLE, f"{folder}/")  # should the kubelet have died before it could


def answer(control_plane: ControlPlane, request: str) -> dict[str, str]:
    try:
        match request:
            case "wait":
                pass  # it was answered when everything was started
            case "kill_apiserver":
                control_plane.kill_apiserver()
            case "start_apiserver":
                control_plane.start_apiserver()
            case _:
                raise ValueError(f"no request {request!r}")
    except Exception as error:  # told to the test that asked, and the others go on
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    return {}


if __name__ == "__main__":
    main()
