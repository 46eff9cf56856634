"""What cancel and suspend say of a request whose fate they cannot know, or do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.backends import OrderStands
from launcher.backends.kubernetes import KubernetesBackend
from launcher.backends.kubernetes_api import KubernetesApi
from launcher.commands.options import Place
from launcher.group import run as run_launcher
from launcher.states import Phase
from tests.launcher.fake_backend import fake_site
from tests.launcher.kubernetes_objects import JOBS, job, lab_run
from tests.launcher.kubernetes_objects import RUN as LAB_RUN
from tests.launcher.kubernetes_stub import running_stub
from tests.launcher.test_site import RUN, server, submitted

ORDERS = ("cancel", "suspend")


def told(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], **how: Any
) -> str:
    site = submitted(fake_site())
    backend = server(site)
    backend.becomes(RUN, Phase.EXECUTING)
    if "interrupt" in how:

        def interrupted(*_: Any, **__: Any) -> Any:
            raise how["interrupt"]

        monkeypatch.setattr(backend, command, interrupted)
    else:
        backend.reachable = False
    monkeypatch.setattr(Place, "open", lambda *_: site)
    assert run_launcher([command, RUN]) == (130 if "interrupt" in how else 5)
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ORDERS)
def test_ctrl_c_says_that_it_goes_on_only_where_the_request_was_taken(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "goes on" in told(command, monkeypatch, capsys, interrupt=OrderStands())
    err = told(command, monkeypatch, capsys, interrupt=KeyboardInterrupt())
    assert "may not have arrived" in err
    assert "goes on" not in err


@pytest.mark.parametrize("command", ORDERS)
def test_nothing_is_left_for_a_server_that_is_away(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    err = told(command, monkeypatch, capsys)
    assert "the server did not answer" in err
    for words in ("is left", "stands", "goes on", "as soon as possible"):
        assert words not in err


@pytest.fixture
def backend(tmp_path: Path) -> Iterator[KubernetesBackend]:
    with running_stub() as stub:
        stub.put(f"{JOBS}/{LAB_RUN}", job(lab_run(), active=1, ready=1))
        yield KubernetesBackend(stub.profile(tmp_path))


@pytest.mark.parametrize("command", ORDERS)
@pytest.mark.parametrize(("step", "raised"), [("patch", KeyboardInterrupt), ("watch", OrderStands)])
def test_the_request_stands_from_its_answer_on(
    backend: KubernetesBackend,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    step: str,
    raised: type[BaseException],
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(KubernetesApi, step, interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        getattr(backend, command)(LAB_RUN)
    assert caught.type is raised
