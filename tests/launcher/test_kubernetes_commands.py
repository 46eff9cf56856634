"""Commands on a cluster of the backend ``kubernetes``, from the command line to a server that is a stub."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.group import run as run_launcher
from tests.launcher.kubernetes_stub import KubernetesStub, running_stub
from tests.launcher.local_run import REPOSITORY

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


# Neither the classes of the API, nor what other commands need, nor what serves single features of the client.
HEAVY = (
    "jinja2", "numpy", "rich", "httpx", "requests", "oauthlib", "websocket", "charset_normalizer",
    "kubernetes.client.models.v1_job", "launcher.presets", "launcher.render",
    "launcher.backends.kubernetes_orders", "launcher.backends.rayjob_facts", "launcher.backends.local",
)  # fmt: skip


def test_a_status_of_many_runs_imports_little_and_hardly_searches_for_garbage(stub: KubernetesStub) -> None:
    """Its time is spent so; counts are steadier than a clock. ``tests/cluster`` has the real server's."""
    assert run_launcher([*SUBMIT, "--name", "infl-model"]) == 0
    [path] = (path for path in stub.objects if "/jobs/" in path)
    for number in range(200):
        name = f"infl-many-{number}"
        written = json.dumps(stub.objects[path]).replace("infl-model", name)
        stub.objects[path.replace("infl-model", name)] = json.loads(written)
    code = (
        "import atexit, gc, sys; from launcher.cli import main\n"
        f"heavy = lambda: sorted(set({HEAVY!r}) & set(sys.modules))\n"
        "searches = lambda: sum(each['collections'] for each in gc.get_stats())\n"
        "atexit.register(lambda: print(heavy(), len(sys.modules), searches(), file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "status", "--cluster", "lab", "-o", "json"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert len(json.loads(done.stdout)) == 201
    heavy, num_modules, num_searches = done.stderr.rsplit(maxsplit=2)
    assert heavy == "[]"
    assert int(num_modules) < 500
    assert int(num_searches) < 30


def test_a_submit_asks_for_the_state_of_a_run_only_where_there_is_one(stub: KubernetesStub) -> None:
    assert run_launcher(list(SUBMIT)) == 0
    asked = [f"{request.method} {request.path.split('/lab/')[1].split('/')[0]}" for request in stub.requests]
    created = asked.index("POST jobs")
    # The plan: Jobs, what else has the name, pods that are left. The order: what is there just before.
    plan, order = ["GET jobs", "GET jobs", "GET pods"], ["GET jobs", "GET pods", "GET rayjobs"]
    assert asked[:created] == plan + order
