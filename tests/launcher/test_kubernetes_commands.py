"""Commands on a cluster of the backend ``kubernetes``, from the command line to a server that is a stub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.group import run as run_launcher
from tests.launcher.kubernetes_stub import KubernetesStub, running_stub

SUBMIT = ("submit", "--preset", "smoke", "--cluster", "lab")
UNMET = "note: cluster.data_claim is null, so the image itself must hold /data/train.parquet"


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesStub]:
    """A server, and a user whose launcher.yaml names it ``lab``."""
    with running_stub() as stub:
        kubeconfig = stub.profile(tmp_path).kubeconfig
        (tmp_path / "launcher.yaml").write_text(
            f"clusters: {{lab: {{backend: kubernetes, kubeconfig: '{kubeconfig}', "
            "cluster: {namespace: lab}}}\n"
        )
        monkeypatch.setenv("INFL_CONFIG", str(tmp_path / "launcher.yaml"))
        monkeypatch.chdir(tmp_path)
        # Whether this tree is committed and pushed, and what its patch holds, is no matter here.
        monkeypatch.setattr("launcher.commands.submit.require_published", lambda run, allow_dirty: run)
        yield stub


def test_data_that_only_the_image_could_hold_is_told_when_a_run_is_submitted(
    stub: KubernetesStub, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_launcher([*SUBMIT, "--dry-run"]) == 0
    assert UNMET in capsys.readouterr().err
    assert run_launcher([*SUBMIT, "--dry-run", "--set", "cluster.data_claim=datasets"]) == 0
    assert UNMET not in capsys.readouterr().err
    assert stub.count("POST", "/jobs$") == 0
    assert run_launcher(list(SUBMIT)) == 0
    assert UNMET in capsys.readouterr().err
    assert stub.count("POST", "/jobs$") == 1
