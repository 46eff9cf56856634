"""No secret is ever shown or stored: every command, in success and failure, with all that it leaves behind.

Secrets stand wherever a user or a site has them. What is searched: everything that commands print (with
``--debug``), the user's folder with results and index, the run directories, and all objects but the Secrets.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from launcher.cli import COMMANDS
from tests.charts.rights import LAUNCHER_RIGHTS
from tests.cluster.bench.api import Api
from tests.cluster.bench.bench import Bench
from tests.cluster.bench.pki import Authority
from tests.cluster.bench.processes import free_ports
from tests.cluster.bench.proxy import Fault, Proxy
from tests.cluster.fake_trainer_image import fake_trainer_image
from tests.cluster.quick_launcher import Ended, QuickLauncher, quick_launcher
from tests.cluster.user import User, install
from tests.launcher.runai_stub import CLIENT_ID, PROJECT, RunaiStub
from tests.launcher.runai_stub import CLIENT_SECRET as RUNAI_SECRET
from tests.launcher.runai_stub import Fault as RunaiFault

RUN = "infl-secretive"
TOKEN = "opaque.kubernetes-token/planted+by-the-tests"  # noqa: S105 - of no known form
#: Of the user's environment and their ~/.netrc.
ENVIRONMENT = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDBYTESTS12",
    "AWS_SECRET_ACCESS_KEY": "planted/AWS+secret/key/of/forty/letters0",
    "AWS_SESSION_TOKEN": "planted-aws-session-token",
    "HF_TOKEN": "hf_PlantedByTheTestsAbcdefghijklmnop",
    "RUNAI_CLIENT_ID": CLIENT_ID,
    "RUNAI_CLIENT_SECRET": RUNAI_SECRET,
}
NETRC_KEY = "fedcba9876543210fedcba9876543210fedcba98"
STORED = {name: f"stored-{value}" for name, value in ENVIRONMENT.items() if not name.startswith("RUNAI")}
PASSWORD = "pass-word-in-the-url"  # noqa: S105
_AT_ONCE = 16  # most of them wait


class Secrets:
    """What must be found nowhere, in every form that it may take."""

    def __init__(self, *secrets: str) -> None:
        self._needles: dict[bytes, str] = {}
        self.add(*(value for name, value in ENVIRONMENT.items() if name != "RUNAI_CLIENT_ID"))
        self.add(NETRC_KEY, TOKEN, PASSWORD, *STORED.values(), *secrets)

    def add(self, *secrets: str) -> None:
        for secret in secrets:
            forms = (
                secret,
                json.dumps(secret)[1:-1],
                urllib.parse.quote(secret, safe=""),
                base64.b64encode(secret.encode()).decode().rstrip("="),
            )
            self._needles |= {form.encode(): secret for form in forms}

    def add_login(self, kubeconfig: Path) -> None:
        """The token or key of a kubeconfig."""
        login = yaml.safe_load(kubeconfig.read_text())["users"][0]["user"]
        if "token" in login:
            self.add(login["token"], login["token"].rpartition(".")[2])  # the signature alone is enough
        if key := login.get("client-key-data"):
            lines = base64.b64decode(key).decode().splitlines()
            self.add(key, key[60:120], *lines[1:-1])

    def refuse(self, text: str | bytes, where: str) -> None:
        content = text.encode() if isinstance(text, str) else text
        for needle, secret in self._needles.items():
            assert needle not in content, f"{where} shows {secret!r}:\n{content.decode(errors='replace')}"

    def refuse_files(self, folder: Path, *, but: Sequence[Path] = ()) -> int:
        """Returns how many were searched."""
        files = [path for path in folder.rglob("*") if path.is_file() and path not in but]
        for path in files:
            self.refuse(path.read_bytes(), str(path))
        return len(files)


def every_command(submit: Sequence[str]) -> list[tuple[str, ...]]:
    """All commands, some in several ways, each as text and as JSON; a new command must be added here."""
    job = tuple(submit[1:])
    ways: dict[str, list[tuple[str, ...]]] = {
        "submit": [job, (*job, "--set", "training.learning_rate=0.5"), (*job, "--dry-run")],
        "render": [job],
        "status": [(), (RUN,), (RUN, "--wait", "--timeout", "0")],
        "logs": [(RUN,), (RUN, "--attempt", "1")],
        "explain": [(RUN,)],
        "events": [(RUN,)],
        "cancel": [(RUN, "--timeout", "0")],
        "suspend": [(RUN, "--timeout", "0")],
        "resume": [(RUN,)],
        "collect": [("--run", RUN)],
        "results": [("list",), ("show", RUN), ("rebuild",)],
        "presets": [("list",), ("show", "smoke")],
        "image": [("--image", "bench/image:1"), ("--check",)],
        "doctor": [job, ()],
    }
    assert set(ways) == set(COMMANDS), "a command is missing here"
    words = [(name, *way) for name, each in ways.items() for way in each]
    as_json = [(*each, "--output", "json") for each in words if each[0] != "logs"]
    return [("--debug", *each) for each in [*words, *as_json]]


def run_all(launcher: QuickLauncher, commands: Sequence[tuple[str, ...]], **environment: str) -> list[Ended]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(lambda words: launcher.run(*words, **environment), commands))


def write_program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def plant_at_home(home: Path) -> list[Path]:
    netrc = home / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {NETRC_KEY}\n")
    netrc.chmod(0o600)
    return [netrc]


def with_login(kubeconfig: Path, path: Path, login: dict[str, object] | None = None, **cluster: str) -> Path:
    """A copy of a kubeconfig with another login or cluster."""
    document = yaml.safe_load(kubeconfig.read_text())
    document["clusters"][0]["cluster"].update(cluster)
    if login is not None:
        document["users"][0]["user"] = login
    path.write_text(yaml.safe_dump(document))
    path.chmod(0o600)
    return path


def plugin(path: Path, script: str) -> dict[str, object]:
    """A login by a credential plugin."""
    command = str(write_program(path, f"#!/bin/sh\n{script}\n"))
    environment = [{"name": "PLUGIN_SECRET", "value": TOKEN}]
    version = "client.authentication.k8s.io/v1"
    return {
        "exec": {"apiVersion": version, "command": command, "env": environment, "interactiveMode": "Never"}
    }


def credential(token: str) -> str:
    """What a plugin prints."""
    document = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {"token": token},
    }
    return f"cat <<'END'\n{json.dumps(document)}\nEND"


@pytest.fixture
def proxy(bench: Bench) -> Iterator[Proxy]:
    """It repeats whatever it is told: the token alone, and the header."""
    proxy = Proxy(
        Api(bench.kubeconfig), bench.folder, lambda sent: f"no: {sent.removeprefix('Bearer ')} ({sent})"
    )
    yield proxy
    proxy.close()


def test_no_secret_is_shown_or_stored_on_kubernetes(
    bench: Bench, user: User, proxy: Proxy, tmp_path: Path
) -> None:
    namespace, keys = user.namespace, tmp_path / "keys"
    keys.mkdir()
    namespace.create_secret("infl-secrets", STORED)
    rules = [
        {"apiGroups": [group], "resources": [resource], "verbs": sorted(verbs)}
        for (group, resource), verbs in LAUNCHER_RIGHTS.items()
    ]
    for account, granted in (("launcher", rules), ("guest", [])):
        namespace.create_service_account(account)
        namespace.grant(account, granted)
    works = namespace.service_account_kubeconfig("launcher")
    guest = namespace.service_account_kubeconfig("guest")
    secrets = Secrets()
    for kubeconfig in (works, guest, bench.kubeconfig):
        secrets.add_login(kubeconfig)
    token = yaml.safe_load(works.read_text())["users"][0]["user"]["token"]
    closed = f"https://127.0.0.1:{free_ports(1)[0]}"
    stranger = base64.b64encode(Authority(keys / "other").certificate.read_bytes()).decode()
    unknown = with_login(works, keys / "unknown", {"token": TOKEN})
    through = proxy.kubeconfig(keys / "through", unknown)  # which its faults do not mind
    logins = plugin(keys / "plugin", credential(token))
    garbled = plugin(keys / "garbled", f"echo token: {TOKEN}")
    expired = plugin(keys / "expired", f"echo {TOKEN}; echo login expired >&2; exit 1")

    def spoiled(kind: str) -> Callable[[], None]:
        return lambda: proxy.faults.append(Fault(kind, times=10**6))

    # Each with words that `status` must say there, so that it is what it is called.
    situations: dict[str, tuple[Path, Callable[[], None] | None, str]] = {
        "it works": (works, None, "SUCCEEDED"),
        "by a client's key": (bench.kubeconfig, None, "SUCCEEDED"),
        "by a plugin": (with_login(works, keys / "by-plugin", logins), None, "SUCCEEDED"),
        "a token that is not known": (unknown, None, "does not accept your credentials"),
        "a plugin's unknown token": (
            with_login(works, keys / "p", plugin(keys / "q", credential(TOKEN))), None, "does not accept"),
        "a plugin that prints no JSON": (with_login(works, keys / "g", garbled), None, "gave no credentials"),
        "a plugin that fails": (with_login(works, keys / "e", expired), None, "login expired"),
        "no rights": (guest, None, "does not let you"),
        "401 that echoes": (through, spoiled("401"), "does not accept your credentials"),
        "403 that echoes": (through, spoiled("403"), "does not let you"),
        "422 that echoes": (through, spoiled("422"), "does not accept what it was sent"),
        "500 that echoes": (through, spoiled("500"), "failed (HTTP 500)"),
        "418 that echoes": (through, spoiled("418"), "HTTP 418"),
        "a login page": (through, spoiled("html"), "no JSON"),
        "a connection that breaks": (through, spoiled("reset"), "cannot be reached"),
        "nobody listens": (with_login(works, keys / "c", server=closed), None, "cannot be reached"),
        "a certificate of somebody else": (
            with_login(works, keys / "t", **{"certificate-authority-data": stranger}), None, "TLS"),
        "a password in the URL": (
            with_login(works, keys / "u", server=closed.replace("//", f"//user:{PASSWORD}@")), None,
            "cannot be reached"),
    }  # fmt: skip
    image = fake_trainer_image(bench, namespace.name, ["say hello", "commit 1", "commit 2", "exit 0"])
    submit = [word for word in user.submit_words(RUN, image) if word != "wandb.mode=disabled"]
    del submit[submit.index("--set", submit.index("training.total_steps=2"))]  # W&B is on: its key is needed
    planted = plant_at_home(user.home)
    commands = every_command(submit)
    with quick_launcher(tmp_path, user.packages, user.home, user.environment | ENVIRONMENT) as launcher:
        user.describe_cluster(works)
        assert launcher.run(*submit).code == 0
        assert launcher.run("status", RUN, "--wait").code == 0
        for situation, (kubeconfig, prepare, words) in situations.items():
            user.describe_cluster(kubeconfig)
            if prepare is not None:
                prepare()
            for ended in run_all(launcher, commands):
                secrets.refuse(ended.text, f"{situation}: {ended.words}")
                assert "this is a bug" not in ended.text, f"{situation}: {ended.words}\n{ended.text}"
            status = launcher.run("status")
            assert words in status.text + launcher.run("status", RUN).text, f"{situation}: {status.text}"
            proxy.faults.clear()
        user.describe_cluster(works)
        with bench.apiserver_killed():
            for ended in run_all(launcher, commands):
                secrets.refuse(ended.text, f"a server that is gone: {ended.words}")
    assert (user.home / "index.sqlite").exists()
    assert secrets.refuse_files(user.home, but=planted) > 5
    assert secrets.refuse_files(user.root) > 5
    for path in (f"{namespace.batch}/jobs", f"{namespace.core}/pods", f"{namespace.core}/events"):
        items = bench.api.items(path)
        assert items
        secrets.refuse(json.dumps(items, ensure_ascii=False), path)


@pytest.mark.slow
def test_no_secret_is_shown_or_stored_at_runai(tmp_path: Path) -> None:
    packages, home = install(tmp_path / "packages"), tmp_path / "home"
    home.mkdir()
    planted = plant_at_home(home)
    submit = ("submit", "--preset", "smoke", "--overlay", "tiny-cpu", "--name", RUN)
    commands = every_command(submit)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(home), "INFL_CLUSTER": "lab",
        "INFL_CONFIG": str(home / "launcher.yaml"), "INFL_RESULTS": str(home / "results"),
        "INFL_INDEX": str(home / "index.sqlite"), **ENVIRONMENT,
    }  # fmt: skip
    kinds = ["401", "403", "409", "500", "html", "reset", "302", "shape"]
    with RunaiStub() as stub, quick_launcher(tmp_path, packages, home, environment) as launcher:
        situations = [("it works", stub.url, None, {})]
        situations += [(kind, stub.url, RunaiFault(kind, after=True, times=10**6), {}) for kind in kinds]
        situations += [
            ("a wrong id, and the server repeats what it was sent", stub.url, None, {"RUNAI_CLIENT_ID": "x"}),
            ("nobody listens", f"http://127.0.0.1:{free_ports(1)[0]}", None, {}),
        ]
        for situation, url, fault, changed in situations:
            profile = {"backend": "runai", "runai": {"url": url, "project": PROJECT}}
            (home / "launcher.yaml").write_text(yaml.safe_dump({"clusters": {"lab": profile}}))
            stub.faults[:] = [fault] if fault else []
            ended_all = run_all(launcher, commands, **changed)
            secrets = Secrets(*stub.all_tokens, *(each.rpartition(".")[2] for each in stub.all_tokens))
            for ended in ended_all:
                secrets.refuse(ended.text, f"{situation}: {ended.words}")
                assert "this is a bug" not in ended.text, f"{situation}: {ended.words}\n{ended.text}"
            code = launcher.run("status", **changed).code
            assert (code == 0) == (situation == "it works"), situation
        assert len(stub.all_tokens) > 20
        secrets.refuse(json.dumps(stub.workloads, ensure_ascii=False), "the trainings")
    assert stub.workloads
    secrets.refuse_files(home, but=planted)
