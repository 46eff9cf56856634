"""Fixtures of the tests on a real control plane."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.bench import programs
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.namespace import Namespace
from tests.cluster.user import User, install

#: Two nodes, as the smallest cluster that has somewhere else to go.
NODES = ("gpu-0", "gpu-1")


@pytest.hookimpl(tryfirst=True)  # before -m chooses among them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "bench" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A control plane with two nodes of eight H200.

    One for a whole session, but for each worker of ``pytest -n`` its own: a killed API server, a lost node
    and the GPUs of a node are everybody's.
    """
    try:
        bench = Bench(tmp_path_factory.getbasetemp() / "controlplane")
    except programs.NoProgramError as error:
        pytest.skip(str(error))
    for node in NODES:
        bench.add_node(node)
    yield bench
    bench.close()


@pytest.fixture
def namespace(bench: Bench) -> Iterator[Namespace]:
    """A fresh namespace."""
    with bench.namespace() as namespace:
        yield namespace


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the launcher as a wheel installs it."""
    return install(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def user(bench: Bench, namespace: Namespace, tmp_path: Path, installed: Path) -> User:
    """Somebody with the launcher, and a namespace that is prepared for runs."""
    return User.of(bench, namespace, tmp_path / "home", installed)


@pytest.fixture(scope="session")
def helm() -> Path:
    """The Helm binary."""
    try:
        return programs.helm()
    except programs.NoProgramError as error:
        pytest.skip(str(error))
