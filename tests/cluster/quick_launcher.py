"""Commands of the launcher, each in a process of its own, at the price of a fork.

``QuickLauncher`` starts ``python quick_launcher.py SOCKET PACKAGES`` once, which imports what commands import
and then forks for every connection. A command is an honest process: it can be killed in the middle, and
nothing of it is left in the next one.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 240.0
_PRELOADED = (
    "launcher.group", "launcher.site", "launcher.lifecycle", "launcher.spec", "launcher.presets",
    "launcher.model", "launcher.story", "launcher.collect", "launcher.launcher_yaml",
    "launcher.backends.kubernetes", "launcher.backends.kubernetes_orders",
    "launcher.backends.kubernetes_transport", "launcher.backends.runai",
    "kubernetes.client.api_client", "kubernetes.config", "pydantic", "yaml", "jinja2", "numpy", "httpx",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended; ``code`` is None where it was killed before it could."""

    words: tuple[str, ...]
    code: int | None
    output: str
    errors: str

    @property
    def text(self) -> str:
        return self.output + self.errors

    @property
    def document(self) -> Any:
        """What it printed with ``--output json``."""
        return json.loads(self.output)


class Command:
    """A command that was started."""

    def __init__(
        self, server: Path, words: tuple[str, ...], environment: Mapping[str, str], home: Path
    ) -> None:
        self.words = words
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.settimeout(_TIMEOUT_S)
        self._connection.connect(str(server))
        request = {"words": words, "environment": dict(environment), "home": str(home)}
        self._lines = self._connection.makefile("rw")
        self._lines.write(json.dumps(request) + "\n")
        self._lines.flush()
        self.pid = int(self._lines.readline())

    def kill(self) -> None:
        """SIGKILL; harmless where it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Ended:
        with self._connection, self._lines:
            line = self._lines.readline()
        answer = json.loads(line) if line else {"code": None, "output": "", "errors": ""}
        return Ended(self.words, answer["code"], answer["output"], answer["errors"])


class QuickLauncher:
    """The server; ``environment`` and ``home`` are those of every command that names no others."""

    def __init__(self, folder: Path, packages: Path, home: Path, environment: Mapping[str, str]) -> None:
        self.home = home
        self.environment = dict(environment)
        self._socket = folder / "launcher.sock"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(self._socket), str(packages)],
            cwd=home,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(packages)},
            stdin=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while not self._socket.exists():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("the launcher's server did not start")
            time.sleep(0.02)

    def start(self, *words: str, **environment: str) -> Command:
        return Command(self._socket, words, self.environment | environment, self.home)

    def run(self, *words: str, **environment: str) -> Ended:
        return self.start(*words, **environment).wait()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def quick_launcher(
    folder: Path, packages: Path, home: Path, environment: Mapping[str, str]
) -> Iterator[QuickLauncher]:
    """A server for as long as the context lasts."""
    launcher = QuickLauncher(folder, packages, home, environment)
    try:
        yield launcher
    finally:
        launcher.close()


def _serve(path: str, packages: str) -> None:
    for name in _PRELOADED:
        importlib.import_module(name)
    assert importlib.import_module("launcher").__file__.startswith(packages)
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(path + ".new")
        server.listen(64)
        server.settimeout(1.0)
        Path(path + ".new").rename(path)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    connection.settimeout(None)
                    _command(connection)
                connection.close()


def _command(connection: socket.socket) -> None:
    """In the child; does not return."""
    import random
    import tempfile

    random.seed()  # waits between retries must differ between commands
    lines = connection.makefile("rw")
    request = json.loads(lines.readline())
    lines.write(f"{os.getpid()}\n")
    lines.flush()
    os.chdir(request["home"])
    os.environ.clear()
    os.environ.update(request["environment"])
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        code: Any = 0
        try:
            importlib.import_module("launcher.cli").main(request["words"])
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 70
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read())
    lines.write(json.dumps({"code": code, "output": texts[0], "errors": texts[1]}) + "\n")
    lines.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.path.pop(0)  # this file's folder
    _serve(sys.argv[1], sys.argv[2])
