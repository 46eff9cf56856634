"""Run:ai's client against a control plane that misbehaves: what is repeated, what never, and what is told.

Every error that a test sees is searched for the secret and the tokens, down its whole chain.
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from time import time
from typing import Any

import pytest

from launcher.backends.runai_client import RunaiClient
from launcher.backends.runai_network import Limits, checked_url
from launcher.backends.runai_refusals import NameTakenError, NotThereError, OutcomeUnknownError
from launcher.errors import BackendError
from launcher.profiles import RunaiAccess
from tests.launcher.runai_stub import CLIENT_ID, CLIENT_SECRET, PROJECT, Fault, RunaiStub
from tests.own_time import give_own_time

ENVIRONMENT = {"RUNAI_CLIENT_ID": CLIENT_ID, "RUNAI_CLIENT_SECRET": CLIENT_SECRET}
QUICK = Limits(connect_s=2, read_s=0.4, answer_s=0.5, answer_bytes=2**20, page_items=2, num_pages=5)
WORKLOADS = "/api/v1/workloads"
TRAININGS = "/api/v1/workloads/trainings"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def stub() -> Iterator[RunaiStub]:
    with RunaiStub() as served:
        yield served


class Waits(list[float]):
    """Stands for sleeping, and remembers."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


@pytest.fixture
def waits() -> Waits:
    return Waits()


def access_to(url: str, **settings: Any) -> RunaiAccess:
    return RunaiAccess(url=url, project=PROJECT, **settings)


@pytest.fixture
def client(stub: RunaiStub, waits: Waits) -> Iterator[RunaiClient]:
    opened = RunaiClient(access_to(stub.url), ENVIRONMENT, limits=QUICK, sleep=waits)
    yield opened
    opened.close()


def everything_told(error: BaseException) -> str:
    """All that an error could ever show: texts and traces of the whole chain, and attributes."""
    told = "".join(traceback.format_exception(error))
    pending: list[BaseException | None] = [error]
    while pending:
        each = pending.pop()
        if each is not None:
            told += repr(each) + repr(each.args) + repr(vars(each))
            pending += [each.__cause__, each.__context__]
    return told


def assert_no_secrets(stub: RunaiStub, *told: str) -> None:
    for secret in (CLIENT_SECRET, json.dumps(CLIENT_SECRET)[1:-1], *stub.all_tokens):
        for text in told:
            assert secret not in text


def refused(
    stub: RunaiStub, ask: Callable[[], object], match: str, kind: type = BackendError
) -> BackendError:
    with pytest.raises(BackendError, match=match) as caught:
        ask()
    assert type(caught.value) is kind
    assert caught.value.next_step
    assert_no_secrets(stub, everything_told(caught.value))
    return caught.value


def test_a_question_gets_one_token_and_keeps_it(stub: RunaiStub, client: RunaiClient) -> None:
    assert client.get("/api/v1/clusters")[0]["name"] == "hall-1"
    client.get("/api/v1/clusters")
    assert stub.calls("POST", "/token") == 1


@pytest.mark.parametrize("lifetime_s", [1, 40])
def test_a_token_is_renewed_before_it_ends(
    stub: RunaiStub, client: RunaiClient, lifetime_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own lifetime: the stub's clock is a week behind."""
    import launcher.backends.runai_client as module

    now_s = 1000.0
    give_own_time(monkeypatch, module, monotonic=lambda: now_s)
    stub.token_lifetime_s = lifetime_s
    client.get("/api/v1/clusters")
    now_s += lifetime_s * 0.4
    client.get("/api/v1/clusters")
    assert stub.calls("POST", "/token") == 1
    now_s += lifetime_s * 0.2
    client.get("/api/v1/clusters")
    assert stub.calls("POST", "/token") == 2


@pytest.mark.parametrize("method", ["get", "post", "delete"])
def test_an_expired_token_is_renewed_once(stub: RunaiStub, client: RunaiClient, method: str) -> None:
    """A refused order was not carried out, so it is given again, too."""
    workload = stub.add("w")
    path = f"{TRAININGS}/{workload['id']}" + ("/suspend" if method == "post" else "")
    client.sign_in()
    stub.expire_tokens()
    getattr(client, method)(path)
    assert stub.calls("POST", "/token") == 2


def test_a_token_that_is_refused_at_once_is_not_renewed_for_ever(
    stub: RunaiStub, client: RunaiClient
) -> None:
    stub.faults.append(Fault("401", method="GET", times=99))
    error = refused(stub, lambda: client.get("/api/v1/clusters"), "refuses the token")
    assert "RUNAI_CLIENT_SECRET" in str(error.next_step)
    assert stub.calls("GET") == 2


def test_wrong_credentials_name_their_variables(stub: RunaiStub) -> None:
    environment = {"MY_ID": CLIENT_ID, "MY_SECRET": "another-secret-value"}
    access = access_to(stub.url, client_id_variable="MY_ID", client_secret_variable="MY_SECRET")  # noqa: S106
    error = refused(stub, RunaiClient(access, environment, limits=QUICK).sign_in, "MY_ID and MY_SECRET")
    assert "another-secret-value" not in everything_told(error), "the server repeats what it was sent"
    assert "wrong credentials" in str(error.why)


@pytest.mark.parametrize("missing", ["RUNAI_CLIENT_ID", "RUNAI_CLIENT_SECRET"])
@pytest.mark.parametrize("value", [None, "", "  "])
def test_a_missing_variable_is_named(missing: str, value: str | None) -> None:
    environment = {**ENVIRONMENT, missing: value}
    environment = {name: text for name, text in environment.items() if text is not None}
    with pytest.raises(BackendError, match=f"{missing} is not set") as caught:
        RunaiClient(access_to("https://lab.run.ai"), environment)
    assert f"export {missing}" in str(caught.value.next_step)


@pytest.mark.parametrize("kind", ["429", "500", "502", "503", "504", "reset", "silent", "trickle"])
def test_a_question_is_repeated_with_jitter(
    stub: RunaiStub, client: RunaiClient, waits: Waits, kind: str
) -> None:
    client.sign_in()
    stub.faults.append(Fault(kind, method="GET", times=2))
    assert client.get("/api/v1/clusters")
    assert stub.calls("GET") == 3
    assert len(waits) == 2
    assert waits[0] <= QUICK.backoff_s
    assert waits[1] <= 2 * QUICK.backoff_s


def test_headers_that_drip_have_an_end(stub: RunaiStub, client: RunaiClient) -> None:
    client.sign_in()
    stub.faults.append(Fault("drip", part="/trainings"))
    error = refused(stub, lambda: client.post(TRAININGS), "failed", OutcomeUnknownError)
    assert "did not end within 0.5 s" in f"{error.what} {error.why}"
    assert client.get("/api/v1/clusters")  # over another connection


@pytest.mark.parametrize("kind", ["429", "503", "reset"])
def test_a_question_is_not_repeated_for_ever(
    stub: RunaiStub, client: RunaiClient, waits: Waits, kind: str
) -> None:
    client.sign_in()
    stub.faults.append(Fault(kind, method="GET", times=99))
    refused(stub, lambda: client.get("/api/v1/clusters"), "tried 5 times")
    assert stub.calls("GET") == QUICK.num_tries
    assert len(set(waits)) == len(waits) == QUICK.num_tries - 1


def test_the_request_for_a_token_is_repeated(stub: RunaiStub, client: RunaiClient, waits: Waits) -> None:
    stub.faults.append(Fault("503", part="/token", times=2))
    client.sign_in()
    assert len(waits) == 2


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(stub: RunaiStub, client: RunaiClient, waits: Waits, as_date: bool) -> None:
    client.sign_in()
    value = formatdate(time() + 60, usegmt=True) if as_date else "60"
    stub.faults.append(Fault("429", method="GET", headers={"Retry-After": value}))
    client.get("/api/v1/clusters")
    assert 30 < waits[0] <= 61


def test_a_retry_after_beyond_patience_is_told_at_once(
    stub: RunaiStub, client: RunaiClient, waits: Waits
) -> None:
    client.sign_in()
    stub.faults.append(Fault("429", method="GET", headers={"Retry-After": "7200"}, times=9))
    error = refused(stub, lambda: client.get("/api/v1/clusters"), "slow down")
    assert "in 7200 s" in str(error.next_step)
    assert not waits


@pytest.mark.parametrize("value", ["soon", "-5", "9" * 40, "Mon, 99 Foo"])
def test_a_retry_after_that_makes_no_sense_is_passed_over(
    stub: RunaiStub, client: RunaiClient, waits: Waits, value: str
) -> None:
    client.sign_in()
    stub.faults.append(Fault("429", method="GET", headers={"Retry-After": value}))
    client.get("/api/v1/clusters")
    assert waits[0] <= QUICK.backoff_s


@pytest.mark.parametrize("kind", ["500", "502", "503", "504", "reset", "silent", "trickle", "html", "huge"])
def test_an_order_is_given_once_and_its_outcome_is_unknown(
    stub: RunaiStub, client: RunaiClient, waits: Waits, kind: str
) -> None:
    client.sign_in()
    stub.faults.append(Fault(kind, part="/trainings", times=99))
    for give in (client.post, client.delete):
        before = len(stub.requests)
        refused(stub, lambda give=give: give(f"{TRAININGS}/x"), "trainings/x", OutcomeUnknownError)
        assert len(stub.requests) == before + 1
    assert not waits


@pytest.mark.parametrize(
    ("kind", "told", "error"),
    [
        ("400", "does not accept", BackendError),
        ("403", "does not permit", BackendError),
        ("404", "nothing is there", NotThereError),
        ("409", "does not accept", NameTakenError),
        ("422", "does not accept", BackendError),
        ("429", "slow down", BackendError),
        ("302", "to another address", BackendError),
    ],
)
def test_a_refused_order_was_not_carried_out(
    stub: RunaiStub, client: RunaiClient, kind: str, told: str, error: type[BackendError]
) -> None:
    client.sign_in()
    elsewhere = {"Location": "http://127.0.0.1:1/"}
    stub.faults.append(Fault(kind, part="/trainings", headers=elsewhere, times=9))
    refused(stub, lambda: client.post(TRAININGS, {}), told, error)
    assert stub.calls("POST", "/trainings") == 1


def test_a_missing_right_says_which_role_would_do(stub: RunaiStub, client: RunaiClient) -> None:
    stub.refused_methods = {("POST", "/trainings"), ("GET", "/projects")}
    error = refused(stub, lambda: client.post(TRAININGS, {}), "does not permit POST")
    assert "create and delete trainings" in str(error.next_step)
    assert f"'{PROJECT}'" in str(error.next_step)
    error = refused(stub, lambda: client.get("/api/v1/org-unit/projects"), "does not permit GET")
    assert "may view projects" in str(error.next_step)


@pytest.mark.parametrize(
    ("kind", "told"), [("html", "not JSON"), ("not-json", "not JSON"), ("huge", "larger than 1048576 bytes")]
)
def test_an_answer_that_cannot_be_read_is_told(
    stub: RunaiStub, client: RunaiClient, kind: str, told: str
) -> None:
    client.sign_in()
    stub.faults.append(Fault(kind, method="GET", times=9))
    error = refused(stub, lambda: client.get("/api/v1/clusters"), "clusters")
    assert told in f"{error.what} {error.why}"
    assert stub.calls("GET") == 1, "asking again gives the same"


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b"9" * 5000, b'{"a": "\xff"}', b'"\\ud800', b"\x1b[31m<html>"]
)
def test_no_json_makes_a_traceback(stub: RunaiStub, client: RunaiClient, body: bytes) -> None:
    client.sign_in()
    stub.faults.append(Fault("shape", method="GET", body=body))
    error = refused(stub, lambda: client.get("/api/v1/clusters"), "not JSON")
    assert "\x1b" not in str(error.why)


@pytest.mark.parametrize(
    "body",
    [b"{}", b"[]", b'{"accessToken": 3}', b'{"accessToken": "a b"}', b'{"accessToken": "a\\r\\nX: y"}'],
)
def test_a_token_must_fit_into_a_header(stub: RunaiStub, client: RunaiClient, body: bytes) -> None:
    stub.faults.append(Fault("shape", part="/token", body=body))
    refused(stub, client.sign_in, "no accessToken")


def test_pages_are_read_to_the_end(stub: RunaiStub, client: RunaiClient) -> None:
    for number in range(7):
        stub.add(f"w{number}")
    names = [entry["name"] for entry in client.pages(WORKLOADS, "workloads")]
    assert names == [f"w{number}" for number in range(7)]
    assert stub.calls("GET") == 4
    stub.page_limit = 1  # a server that gives less than it is asked for
    stub.workloads = stub.workloads[:4]
    assert [entry["name"] for entry in client.pages(WORKLOADS, "workloads")] == names[:4]
    assert len(list(client.pages(WORKLOADS, "workloads", max_items=3))) == 3


def test_a_list_without_an_end_is_given_up(stub: RunaiStub, client: RunaiClient) -> None:
    for number in range(40):
        stub.add(f"w{number}")
    refused(stub, lambda: list(client.pages(WORKLOADS, "workloads")), "more than 5 pages")
    same = json.dumps({"workloads": [{"id": 1}, {"id": 2}], "next": 99}).encode()
    stub.faults.append(Fault("shape", method="GET", body=same, times=99))
    refused(stub, lambda: list(client.pages(WORKLOADS, "workloads")), "the same page")


@pytest.mark.parametrize("body", [b"[]", b"null", b"3", b"{}", b'{"workloads": {}}', b""])
def test_a_list_of_another_shape_is_told(stub: RunaiStub, client: RunaiClient, body: bytes) -> None:
    stub.faults.append(Fault("shape", method="GET", body=body))
    refused(stub, lambda: list(client.pages(WORKLOADS, "workloads")), "no list 'workloads'")


def closed_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def test_a_connection_that_is_refused_is_no_doubt(stub: RunaiStub, waits: Waits) -> None:
    """Nothing arrived, so an order was not carried out."""
    access = access_to(f"http://127.0.0.1:{closed_port()}")
    client = RunaiClient(access, ENVIRONMENT, limits=QUICK, sleep=waits)
    error = refused(stub, lambda: client.post(TRAININGS, {}), "token failed")
    assert "refused" in str(error.why)


def test_an_unknown_host_is_told(stub: RunaiStub, monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    client = RunaiClient(access_to("https://lab.invalid"), ENVIRONMENT, limits=QUICK, sleep=waits)
    error = refused(stub, client.sign_in, "https://lab.invalid")
    assert "no host of this name" in str(error.why)
    assert not waits, "it will not be known in a second"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate that no one trusts, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=lab",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key", "-out", folder / "cert"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert", folder / "key"


def test_tls_is_checked_against_the_profiles_authority(
    stub: RunaiStub, certificate: tuple[Path, Path], tmp_path: Path, waits: Waits
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    stub.server.socket = context.wrap_socket(stub.server.socket, server_side=True)
    url = stub.url.replace("http:", "https:")

    def ask(ca_file: Path | None) -> Any:
        access = access_to(url, ca_file=ca_file)
        return RunaiClient(access, ENVIRONMENT, limits=QUICK, sleep=waits).get("/api/v1/clusters")

    assert ask(certificate[0])
    error = refused(stub, lambda: ask(None), "token failed")
    assert "not trusted" in str(error.why)
    assert "ca_file" in str(error.next_step)
    assert not waits
    refused(stub, lambda: ask(tmp_path / "none.pem"), "none.pem cannot be used")
    (tmp_path / "text.pem").write_text("no certificate")
    assert "in PEM" in str(refused(stub, lambda: ask(tmp_path / "text.pem"), "text.pem").why)


def test_a_proxy_that_cannot_be_used_is_told_without_its_password(
    stub: RunaiStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "nonsense://user:proxy-password@127.0.0.1:1")
    client = RunaiClient(access_to(stub.url), ENVIRONMENT, limits=QUICK)
    error = refused(stub, client.sign_in, "no connection to")
    assert "proxy-password" not in everything_told(error)


@pytest.mark.parametrize(
    "url",
    ["", "lab.run.ai", "http://lab.run.ai", "https://", "https://lab.run.ai/api", "https://lab.run.ai?x=1",
     "https://me:url-password@lab.run.ai", "https://lab.run.ai:99999", "https://lab run.ai", "ftp://lab.run.ai",
     "https://lab.run.ai\n", "https://[::1", "file:///etc/passwd"],
)  # fmt: skip
def test_an_address_that_no_secret_may_go_to_is_refused(url: str) -> None:
    with pytest.raises(BackendError, match=r"runai\.url cannot be used") as caught:
        RunaiClient(access_to(url), ENVIRONMENT)
    assert "url-password" not in everything_told(caught.value)


@pytest.mark.parametrize("url", ["https://lab.run.ai", "https://lab.run.ai/", "http://127.0.0.1:8080"])
def test_an_address_is_taken_without_its_slash(url: str) -> None:
    assert checked_url(url) == url.rstrip("/")


def test_secrets_do_not_show(
    stub: RunaiStub, client: RunaiClient, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in a repr, not in what httpx and httpcore log, not in an answer that repeats them."""
    with caplog.at_level(logging.DEBUG):
        client.get("/api/v1/clusters")
        repeats = json.dumps({"message": f"{stub.all_tokens[-1]} and {CLIENT_SECRET}"}).encode()
        stub.faults.append(Fault("shape", method="GET", body=repeats))
        assert client.get("/api/v1/clusters") == {"message": "*** and ***"}
    shown = [repr(client), repr(vars(client)), repr(client._credentials), caplog.text, *capfd.readouterr()]
    assert_no_secrets(stub, *(text for text in shown if text is not shown[1]))
    assert CLIENT_SECRET not in shown[1]


def test_httpx_is_imported_only_where_run_ai_is_asked() -> None:
    code = "import sys, launcher.backends.runai, launcher.runai_values; print('httpx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
