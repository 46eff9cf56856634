from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from influence.rundir import RunPaths
from influence.store.objects import Objects
from influence.store.run_store import RunStore

from .s3_server import S3Server

RUN = "infl-test-0221"
_numbers = itertools.count()


@pytest.fixture(scope="session")
def _server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def server(_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in _server.environment.items():
        monkeypatch.setenv(name, value)
    _server.between.clear()
    yield _server
    _server.between.clear()


@pytest.fixture
def url(server: S3Server) -> str:
    """The folder of the runs, in a bucket of its own."""
    bucket = f"test-bucket-{next(_numbers)}"
    httpx.put(f"{server.endpoint}/{bucket}", timeout=10).raise_for_status()
    server.between.requests.clear()
    return f"s3://{bucket}/influence"


@pytest.fixture
def objects(url: str) -> Objects:
    return Objects(f"{url}/{RUN}", patience_s=5)


@pytest.fixture
def on_a_fresh_disk(tmp_path: Path, url: str) -> Callable[[], RunStore]:
    """The run as another machine sees it: the same store, an empty directory."""

    def make() -> RunStore:
        paths = RunPaths.of(tmp_path / f"disk-{next(_numbers)}", RUN)
        return RunStore.of(url, paths, patience_s=5)

    return make


def stored(objects: Objects) -> dict[str, bytes]:
    """Everything in the store, by key."""
    return {entry.key: objects.read(entry.key) for entry in objects.list("")}
