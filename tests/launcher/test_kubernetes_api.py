"""The layer over the API: errors in words, retries, doubts about a POST, watches, and no token anywhere."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.backends import kubernetes_api, kubernetes_connection, kubernetes_transport
from launcher.backends.kubernetes_api import MAX_TRIES, KubernetesApi
from launcher.backends.kubernetes_connection import Connection, open_connection
from launcher.backends.kubernetes_errors import (
    ApiConflict,
    ApiForbidden,
    ApiInvalid,
    ApiNotFound,
    ApiRefused,
    ApiUnanswered,
    Target,
    api_path,
)
from launcher.errors import BackendError, LauncherError
from launcher.profiles import Profile
from tests.launcher.kubernetes_stub import TOKEN, KubernetesStub, running_stub, status, write_kubeconfig

JOBS = api_path("batch/v1", "jobs", namespace="lab")
NO_RIGHT = 'jobs.batch is forbidden: User "ada" cannot %s resource "jobs" in the namespace "lab"'
JOB = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}


@pytest.fixture
def stub() -> Iterator[KubernetesStub]:
    with running_stub() as stub:
        yield stub


@pytest.fixture
def api(stub: KubernetesStub, tmp_path: Path) -> KubernetesApi:
    return KubernetesApi(stub.profile(tmp_path))


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Every wait before a retry, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(kubernetes_api, "sleep", waits.append)
    return waits


def told(error: LauncherError) -> str:
    """Everything that a person could get to see of an error, with a traceback."""
    return "\n".join(
        [str(error), repr(error), json.dumps(error.as_dict()), *traceback.format_exception(error)]
    )


def test_objects_are_plain_json(api: KubernetesApi, stub: KubernetesStub) -> None:
    created = api.create(JOBS, JOB)
    assert api.get(f"{JOBS}/a") == created
    assert api.patch(f"{JOBS}/a", {"spec": {"suspend": True}})["spec"] == {"suspend": True}
    assert [item["metadata"]["name"] for item in api.list(JOBS)["items"]] == ["a"]
    patch = next(r for r in stub.requests if r.method == "PATCH")
    assert patch.headers["Content-Type"] == "application/merge-patch+json"
    assert all(r.headers["Authorization"] == f"Bearer {TOKEN}" for r in stub.requests)


@pytest.mark.parametrize(
    ("code", "reason", "message", "kind", "words"),
    [
        (401, "Unauthorized", "Unauthorized", ApiForbidden, "does not accept your credentials"),
        (403, "Forbidden", NO_RIGHT % "list", ApiForbidden, "right 'list' on 'jobs.batch' in"),
        (403, "Forbidden", "blocked by the firewall", ApiForbidden, "blocked by the firewall"),
        (404, "NotFound", "the server could not find", ApiNotFound, "has no jobs.batch in namespace 'lab'"),
        (409, "Conflict", "modified", ApiConflict, "has just changed"),
        (429, "TooManyRequests", "later", ApiUnanswered, "is too busy (HTTP 429)"),
        (500, "InternalError", "etcd", ApiUnanswered, "failed (HTTP 500)"),
        (503, "ServiceUnavailable", "", ApiUnanswered, "failed (HTTP 503)"),
    ],
)  # fmt: skip
def test_each_answer_has_an_error_with_place_reason_and_next_step(
    api: KubernetesApi, stub: KubernetesStub, code: int, reason: str, message: str, kind: type, words: str
) -> None:
    stub.fail("GET", "/jobs$", status=code, body=status(code, reason, message), times=MAX_TRIES)
    with pytest.raises(kind) as caught:
        api.list(JOBS)
    assert words in f"{caught.value.what} {caught.value.why}"
    assert "context lab" in caught.value.what and stub.url in caught.value.what
    assert (caught.value.status, caught.value.reason) == (code, reason)
    assert TOKEN not in told(caught.value)
    retried = code in (429, 500, 503)
    assert stub.count("GET", "/jobs$") == (MAX_TRIES if retried else 1)


def test_a_missing_right_is_named_with_who_grants_it(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.fail("POST", "/jobs$", status=403, body=status(403, "Forbidden", NO_RIGHT % "create"))
    with pytest.raises(ApiForbidden) as caught:
        api.create(JOBS, JOB)
    assert "the right 'create' on 'jobs.batch' in namespace 'lab' is missing" in str(caught.value.why)
    assert "charts/influence" in str(caught.value.next_step)
    assert "kubectl auth can-i create jobs.batch -n lab" in str(caught.value.next_step)
    assert stub.count("POST", "/jobs$") == 1


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("exceeded quota: gpus", "a quota is used up"),
        ("unable to create new content in namespace lab because it is being terminated", "is being deleted"),
        (
            "ValidatingAdmissionPolicy 'no-ada' with binding 'b' denied request: it cannot be",
            "denied request",
        ),
        ('violates PodSecurity "restricted:latest": runAsNonRoot != true', "runAsNonRoot"),
    ],
)
def test_a_refusal_by_a_rule_is_no_missing_right(
    api: KubernetesApi, stub: KubernetesStub, message: str, words: str
) -> None:
    message = f'jobs.batch "a" is forbidden: {message}'
    for ask in (api.create, api.ask):
        stub.fail("POST", "/jobs$", status=403, body=status(403, "Forbidden", message))
        with pytest.raises(ApiRefused) as caught:
            ask(JOBS, JOB)
        assert words in f"{caught.value.what} {caught.value.why}"
        assert message in str(caught.value.why)
        assert "right" not in told(caught.value).split("Traceback")[0]
        assert caught.value.next_step


def test_an_object_that_is_not_acceptable_names_its_fields(api: KubernetesApi, stub: KubernetesStub) -> None:
    body = status(
        422, "Invalid", "Job is invalid",
        causes=[{"field": "spec.backoffLimit", "message": "must be >= 0"}, {"field": "", "message": "odd"}],
    )  # fmt: skip
    stub.fail("POST", "/jobs$", status=422, body=body)
    with pytest.raises(ApiInvalid) as caught:
        api.create(JOBS, JOB)
    assert caught.value.why == "spec.backoffLimit: must be >= 0\n(object): odd"


def test_a_proxys_page_is_no_answer(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.fail("GET", "/jobs$", status=200, body="<html>please log in</html>", times=MAX_TRIES)
    with pytest.raises(ApiUnanswered, match="no answer of the Kubernetes API: no JSON"):
        api.list(JOBS)
    stub.fail("GET", "/jobs$", status=403, body="<html>please log in</html>")
    with pytest.raises(ApiForbidden) as caught:
        api.list(JOBS)
    assert "<html>" not in told(caught.value)


def test_a_proxy_that_repeats_our_token_is_quoted_without_it(
    api: KubernetesApi, stub: KubernetesStub
) -> None:
    stub.fail("GET", "/jobs$", status=418, body=f"cannot brew for {TOKEN} (Authorization: Bearer {TOKEN})")
    with pytest.raises(BackendError, match="HTTP 418") as caught:
        api.list(JOBS)
    assert "cannot brew for ***" in str(caught.value.why)
    assert TOKEN not in told(caught.value)


LISTED = '{"kind": "JobList", "metadata": {"resourceVersion": "1"}, "items": %s}'


@pytest.mark.parametrize(
    "body",
    [
        "{}", "[1]", "NaN", "null", '{"items": []}', LISTED % '"abc"', LISTED % "[1]", LISTED % "[{}]",
        LISTED % '[{"metadata": 5}]', LISTED % "{}", '{"kind": "JobList", "items": []}',
        '{"kind": "JobList", "metadata": {}, "items": []}', LISTED % ("[" * 60_000),
    ],
)  # fmt: skip
def test_what_is_no_list_says_nothing_of_what_is_there(
    api: KubernetesApi, stub: KubernetesStub, body: str
) -> None:
    stub.fail("GET", "/jobs$", status=200, body=body, times=MAX_TRIES)
    with pytest.raises(ApiUnanswered, match="no answer of the Kubernetes API"):
        api.list(JOBS)
    stub.fail("GET", "/jobs$", status=200, body=body)
    assert api.list(JOBS)["items"] == []  # the next answer is one


def test_an_empty_list_may_be_null(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.fail("GET", "/jobs$", status=200, body=LISTED % "null")
    assert api.list(JOBS)["items"] == []


@pytest.mark.parametrize(
    "body", ["{}", "[]", '{"kind": "Pod", "metadata": {}}', '{"kind": 5}', '{"kind": "Job"}', '{"kind": ""}']
)
def test_an_object_is_of_the_kind_that_was_asked_for(
    api: KubernetesApi, stub: KubernetesStub, body: str
) -> None:
    stub.put(f"{JOBS}/b", {})
    stub.fail("GET", "/jobs/b$", status=200, body=body, times=MAX_TRIES)
    with pytest.raises(ApiUnanswered):
        api.get(f"{JOBS}/b")
    stub.fail("PATCH", "/jobs/b$", status=200, body=body, times=MAX_TRIES)
    with pytest.raises(ApiUnanswered):
        api.patch(f"{JOBS}/b", {"spec": {"suspend": True}})


def test_an_order_with_an_answer_that_is_none_is_looked_for(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.fail("POST", "/jobs$", status=200, body="{}", carried_out=True)
    assert api.create(JOBS, JOB)["metadata"]["uid"]
    assert stub.count("POST", "/jobs$") == 1


@contextmanager
def sending(start: bytes, piece: bytes, times: int, every_s: float = 0.0) -> Iterator[str]:
    """A server that answers whatever it is asked with the same bytes; yields its address."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(2**16)
            with suppress(OSError):
                self.request.sendall(start)
                for _ in range(times):
                    time.sleep(every_s)
                    self.request.sendall(piece)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("start", "piece"),
    [(OK + b"Content-Length: 60\r\n\r\n", b" "), (OK, b"X: 1\r\n"), (b"HTTP/1.1 500 No\r\n\r\n", b" ")],
)
def test_an_answer_that_drips_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, piece: bytes
) -> None:
    monkeypatch.setattr(kubernetes_transport, "ANSWER_S", 0.3)
    monkeypatch.setattr(kubernetes_api, "MAX_TRIES", 1)
    with sending(start, piece, 60, 0.05) as url:
        api = KubernetesApi(profile_of(write_kubeconfig(tmp_path / "config", url, {"token": TOKEN})))
        with pytest.raises(ApiUnanswered, match="did not end within") as caught:
            api.list(JOBS)
        assert caught.value.perhaps_done
        if b"200" in start and b"Content" not in start:
            with pytest.raises(ApiUnanswered, match="did not end within"):
                api.stream_log("lab", "a", container="trainer")


ZEROS = gzip.compress(bytes(2**26))


@pytest.mark.parametrize(
    ("start", "piece", "times"),
    [
        (OK + b"\r\n", b" " * 2**16, 2**10),
        (b"HTTP/1.1 500 No\r\n\r\n", b" " * 2**16, 2**10),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(ZEROS), ZEROS, 1),
    ],
    ids=["endless", "endless error", "bomb"],
)
def test_an_answer_without_an_end_is_not_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, piece: bytes, times: int
) -> None:
    monkeypatch.setattr(kubernetes_transport, "ANSWER_BYTES", 2**20)
    with sending(start, piece, times) as url:
        api = KubernetesApi(profile_of(write_kubeconfig(tmp_path / "config", url, {"token": TOKEN})))
        with pytest.raises(ApiUnanswered, match="more than 1 MiB"):
            api.list(JOBS)


def test_retry_after_is_honoured_and_other_waits_are_jittered(
    api: KubernetesApi, stub: KubernetesStub, waits: list[float]
) -> None:
    stub.fail("GET", "/jobs$", status=429, headers={"Retry-After": "3"}, times=2)
    api.list(JOBS)
    assert waits == [3, 3]
    waits.clear()
    for _ in range(20):
        stub.fail("GET", "/jobs$", status=500, times=3)
        api.list(JOBS)
    by_try = [waits[i::3] for i in range(3)]
    for number, group in enumerate(by_try):
        assert all(0 <= wait <= 0.2 * 2**number for wait in group)
        assert len(set(group)) > 10


def test_a_server_that_asks_for_too_long_is_not_waited_for(
    api: KubernetesApi, stub: KubernetesStub, waits: list[float]
) -> None:
    stub.fail("GET", "/jobs$", status=429, headers={"Retry-After": "3600"})
    with pytest.raises(ApiUnanswered):
        api.list(JOBS)
    assert waits == []


@pytest.mark.parametrize("drop", [False, True])
def test_a_lost_answer_to_a_create_is_resolved_by_reading(
    api: KubernetesApi, stub: KubernetesStub, drop: bool
) -> None:
    stub.fail("POST", "/jobs$", status=502, body="bad gateway", carried_out=True, drop=drop)
    assert api.create(JOBS, JOB)["metadata"]["uid"]
    assert stub.count("POST", "/jobs$") == 1
    assert len(stub.objects) == 1


@pytest.mark.parametrize("drop", [False, True])
def test_a_create_that_was_not_carried_out_is_sent_again(
    api: KubernetesApi, stub: KubernetesStub, drop: bool
) -> None:
    stub.fail("POST", "/jobs$", status=502, drop=drop, times=2)
    api.create(JOBS, JOB)
    assert stub.count("POST", "/jobs$") == 3
    assert stub.count("GET", "/jobs/a$") == 2


def test_a_taken_name_is_a_conflict_at_once(api: KubernetesApi, stub: KubernetesStub) -> None:
    api.create(JOBS, JOB)
    with pytest.raises(ApiConflict) as caught:
        api.create(JOBS, JOB)
    assert caught.value.already_exists
    assert stub.count("POST", "/jobs$") == 2


def test_a_patch_is_sent_again(api: KubernetesApi, stub: KubernetesStub) -> None:
    api.create(JOBS, JOB)
    stub.fail("PATCH", "/jobs/a$", status=504, carried_out=True)
    assert api.patch(f"{JOBS}/a", {"spec": {"suspend": True}})["spec"]["suspend"] is True
    assert stub.count("PATCH", "/jobs/a$") == 2


def test_a_refused_connection_is_told_after_some_tries(
    api: KubernetesApi, stub: KubernetesStub, waits: list[float]
) -> None:
    stub.stop()
    with pytest.raises(ApiUnanswered, match="cannot be reached") as caught:
        api.get(f"{JOBS}/a")
    assert caught.value.why == "connection refused"
    assert not caught.value.perhaps_done
    assert len(waits) == MAX_TRIES - 1
    assert TOKEN not in told(caught.value)


def test_a_silent_server_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from launcher.backends import kubernetes_transport

    monkeypatch.setattr(kubernetes_transport, "READ_TIMEOUT_S", 0.05)
    monkeypatch.setattr(kubernetes_transport.Transport._open, "__kwdefaults__", {
        **(kubernetes_transport.Transport._open.__kwdefaults__ or {}), "read_timeout_s": 0.05,
    })  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        path = write_kubeconfig(
            tmp_path / "config", f"http://127.0.0.1:{listener.getsockname()[1]}", {"token": TOKEN}
        )
        api = KubernetesApi(Profile(name="lab", backend="kubernetes", kubeconfig=path))
        with pytest.raises(ApiUnanswered) as caught:
            api.get(f"{JOBS}/a")
    assert "said nothing" in str(caught.value.why)
    assert caught.value.perhaps_done


def test_a_certificate_that_is_not_trusted_is_not_asked_again(tmp_path: Path, waits: list[float]) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert,
         "-subj", "/CN=lab", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "1"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    accepted = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            accepted.append(1)
            with suppress(OSError):
                context.wrap_socket(connection, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        server = f"https://127.0.0.1:{listener.getsockname()[1]}"
        path = write_kubeconfig(tmp_path / "config", server, {"token": TOKEN})
        with pytest.raises(ApiUnanswered) as caught:
            KubernetesApi(Profile(name="lab", backend="kubernetes", kubeconfig=path)).get(JOBS)
    assert "certificate verify failed: self-signed certificate" in str(caught.value.why)
    assert "certificate-authority" in str(caught.value.next_step)
    assert (waits, len(accepted)) == ([], 1)


# -- watches


def names(state: object) -> list[str]:
    assert isinstance(state, dict)
    return sorted(state)


def test_a_watch_shows_the_state_and_every_change(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.put(f"{JOBS}/a", {})
    states = api.watch(JOBS, timeout_s=30)
    assert names(next(states)) == ["a"]
    stub.put(f"{JOBS}/b", {})
    assert names(next(states)) == ["a", "b"]
    stub.remove(f"{JOBS}/a")
    assert names(next(states)) == ["b"]
    assert stub.count("GET", "/jobs$") == 2


def test_a_watch_lists_again_when_its_version_is_gone(api: KubernetesApi, stub: KubernetesStub) -> None:
    states = api.watch(JOBS, timeout_s=30)
    assert names(next(states)) == []
    stub.put(f"{JOBS}/a", {})
    assert names(next(states)) == ["a"]
    with stub.lock:
        stub.remove(f"{JOBS}/a")
        stub.put(f"{JOBS}/b", {})
        stub.changes.clear()  # never told
        stub.forget_versions()
    assert names(next(states)) == ["b"]


def test_a_watch_goes_on_where_a_closed_connection_left_it(api: KubernetesApi, stub: KubernetesStub) -> None:
    states = api.watch(JOBS, timeout_s=30)
    next(states)
    for name in "abc":
        stub.watches_cut += 1
        stub.put(f"{JOBS}/{name}", {})
        assert name in names(next(states))
    assert sum("watch" not in r.query for r in stub.requests) == 1


def test_a_watch_outlives_a_restart_of_the_server(
    api: KubernetesApi, stub: KubernetesStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = api.watch(JOBS, timeout_s=60)
    next(states)
    stub.stop()
    calls = itertools.count()

    def start_after_a_while(_: float) -> None:
        if next(calls) == 12:  # more tries than one call has
            stub.start()
            stub.put(f"{JOBS}/a", {})

    monkeypatch.setattr(kubernetes_api, "sleep", start_after_a_while)
    assert names(next(states)) == ["a"]
    assert next(calls) > 12


def test_a_watch_ends_when_its_time_is_up(api: KubernetesApi, stub: KubernetesStub) -> None:
    assert [names(state) for state in api.watch(JOBS, timeout_s=0.05)] == [[]]


def test_a_watch_without_the_right_says_so(api: KubernetesApi, stub: KubernetesStub) -> None:
    stub.on_request = lambda r: (
        stub.fail("GET", "/jobs$", status=403, body=status(403, "Forbidden", "no"))
        if not r.query.get("watch") else None
    )  # fmt: skip
    states = api.watch(JOBS, timeout_s=5)
    next(states)
    with pytest.raises(ApiForbidden):
        next(states)


# -- kubeconfigs


def profile_of(path: Path | None, **changes: object) -> Profile:
    return replace(Profile(name="lab", backend="kubernetes", kubeconfig=path), **changes)  # type: ignore[arg-type]


def edited(path: Path, change: object) -> Path:
    document = yaml.safe_load(path.read_text())
    assert callable(change)
    change(document)
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"token": TOKEN})


def test_no_kubeconfig_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(BackendError, match="no kubeconfig for the cluster profile 'lab'"):
        open_connection(profile_of(None))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "gone"))
    with pytest.raises(BackendError, match=r"KUBECONFIG names .*gone"):
        open_connection(profile_of(None))


def test_the_kubeconfig_is_the_profiles_then_the_environments_then_the_homes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Path
) -> None:
    second = write_kubeconfig(tmp_path / "second", "https://127.0.0.1:2", {"token": TOKEN})
    (tmp_path / ".kube").mkdir()
    write_kubeconfig(tmp_path / ".kube" / "config", "https://127.0.0.1:3", {"token": TOKEN})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'gone'}:{second}")
    assert open_connection(profile_of(config)).host == "https://127.0.0.1:1"
    assert open_connection(profile_of(None)).host == "https://127.0.0.1:2"
    monkeypatch.delenv("KUBECONFIG")
    assert open_connection(profile_of(None)).host == "https://127.0.0.1:3"


def test_a_service_account_inside_a_cluster_without_its_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(BackendError, match="the pod's service account: cannot be used"):
        open_connection(profile_of(None))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("current-context"), "no current context"),
        (lambda c: c.update({"current-context": "x"}), "no context 'x'"),
        (lambda c: c.update(clusters=[]), "names the cluster 'lab', which is not there"),
        (lambda c: c.update(users=None), "names the user 'ada', which is not there"),
        (lambda c: c["users"][0]["user"].update(
            {"client-certificate-data": "abc"}), "cannot be used to reach a cluster"),
        (lambda c: c["users"][0]["user"].update({"client-certificate": "gone.pem"}), "cannot be used"),
        (lambda c: c.update(contexts=5), "'contexts' must be a list"),
        (lambda c: c.update(users={"a": 1}), "'users' must be a list"),
        (lambda c: c["contexts"][0]["context"].update(cluster=["lab"]), "names the cluster"),
        (lambda c: c["clusters"][0]["cluster"].update(server=5), "cannot be used"),
        (lambda c: c["clusters"][0]["cluster"].update(server="https://[x"), "cannot be used"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_kubeconfig_is_said(config: Path, change: object, words: str) -> None:
    with pytest.raises(BackendError) as caught:
        open_connection(profile_of(edited(config, change)))
    assert words in str(caught.value)
    assert str(config) in str(caught.value)
    assert TOKEN not in told(caught.value)


def test_a_context_that_is_not_there_shows_those_that_are(config: Path) -> None:
    with pytest.raises(BackendError, match="no context 'prod'") as caught:
        open_connection(profile_of(config, context="prod"))
    assert caught.value.why == "it has lab"
    assert "cluster profile 'lab'" in str(caught.value.next_step)


def test_a_kubeconfig_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="No such file"):
        open_connection(profile_of(tmp_path / "gone"))
    broken = tmp_path / "broken"
    broken.write_text(f"users:\n- token: {TOKEN}\n  : [")
    with pytest.raises(BackendError, match="not valid YAML, line 3") as caught:
        open_connection(profile_of(broken))
    assert TOKEN not in told(caught.value)
    broken.write_text("[" * 5000)
    with pytest.raises(BackendError, match="not valid YAML"):
        open_connection(profile_of(broken))
    broken.write_text("contexts: 2026-99-99")
    with pytest.raises(BackendError, match="not valid YAML"):
        open_connection(profile_of(broken))
    broken.write_text("- a list")
    with pytest.raises(BackendError, match="must be one mapping"):
        open_connection(profile_of(broken))


@pytest.mark.parametrize("written", ["false", "true", "", 0, 1, [], "no"])
def test_only_true_and_false_say_whether_the_certificate_is_checked(tmp_path: Path, written: object) -> None:
    skip = {"insecure-skip-tls-verify": written}
    path = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"token": TOKEN}, **skip)
    with pytest.raises(BackendError, match="must be true or false"):
        open_connection(profile_of(path))


def test_a_certificate_that_is_not_checked_is_told(tmp_path: Path) -> None:
    def opened(**cluster: object) -> Connection:
        path = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", {"token": TOKEN}, **cluster)
        return open_connection(profile_of(path))

    unchecked = opened(**{"insecure-skip-tls-verify": True})
    assert "(context lab, its certificate unchecked)" in unchecked.place
    assert unchecked.pool.connection_pool_kw["cert_reqs"] == ssl.CERT_NONE
    for checked in (opened(), opened(**{"insecure-skip-tls-verify": False})):
        assert checked.place.endswith("(context lab)")
        assert checked.pool.connection_pool_kw["cert_reqs"] == ssl.CERT_REQUIRED


@pytest.mark.parametrize("server", ["10.0.0.1:6443", "ftp://h", "https://", ""])
def test_a_server_that_is_no_url(tmp_path: Path, server: str) -> None:
    path = write_kubeconfig(tmp_path / "config", server, {"token": TOKEN})
    with pytest.raises(BackendError, match="server is no URL"):
        open_connection(profile_of(path))


@pytest.mark.parametrize("between", ["\r\n", "\0", "\u0142", "\u00e9"])
def test_a_token_that_cannot_be_sent_is_not_shown(stub: KubernetesStub, tmp_path: Path, between: str) -> None:
    path = write_kubeconfig(tmp_path / "config", stub.url, {"token": TOKEN + between + "tail"})
    with pytest.raises(BackendError, match="cannot be sent") as caught:
        KubernetesApi(profile_of(path)).list(JOBS)
    assert TOKEN not in told(caught.value)
    assert stub.requests == []


def test_a_line_end_after_the_token_is_no_part_of_it(stub: KubernetesStub, tmp_path: Path) -> None:
    path = write_kubeconfig(tmp_path / "config", stub.url, {"token": TOKEN + "\n"})
    KubernetesApi(profile_of(path)).list(JOBS)
    assert stub.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"


def exec_user(command: str, *args: str) -> dict[str, object]:
    plugin = {"apiVersion": "client.authentication.k8s.io/v1", "command": command, "args": list(args),
              "interactiveMode": "Never", "installHint": "get it from https://example.org"}  # fmt: skip
    return {"exec": plugin}


def test_a_credential_plugin_that_is_missing_or_fails(tmp_path: Path) -> None:
    path = tmp_path / "config"
    write_kubeconfig(path, "https://127.0.0.1:1", exec_user("no-such-plugin"))
    with pytest.raises(BackendError, match="'no-such-plugin', which is not installed") as caught:
        open_connection(profile_of(path))
    assert caught.value.why == "get it from https://example.org"
    write_kubeconfig(path, "https://127.0.0.1:1", exec_user("sh", "-c", "echo session expired >&2; exit 3"))
    with pytest.raises(BackendError, match="gave no credentials") as caught:
        open_connection(profile_of(path))
    assert "session expired" in str(caught.value.why)


def test_a_credential_plugin_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_connection, "LOGIN_S", 0.3)
    user = exec_user("sh", "-c", "sleep 3; exit 3")
    path = write_kubeconfig(tmp_path / "config", "https://127.0.0.1:1", user)
    with pytest.raises(BackendError, match="no credentials within"):
        open_connection(profile_of(path))


def test_a_pipe_is_no_kubeconfig(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Timer(
        3, lambda: (tmp_path / "pipe").write_text("{}")
    )  # so that nothing waits for ever
    writer.daemon = True
    writer.start()
    with pytest.raises(BackendError, match="no regular file"):
        open_connection(profile_of(tmp_path / "pipe"))
    writer.cancel()


def test_a_credential_plugins_token_is_sent_and_asked_for_anew_when_it_expires(
    stub: KubernetesStub, tmp_path: Path
) -> None:
    count = tmp_path / "count"
    script = tmp_path / "plugin"
    credential = {"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential",
                  "status": {"token": "t-$N", "expirationTimestamp": "2020-01-01T00:00:00Z"}}  # fmt: skip
    script.write_text(
        f"#!/bin/sh\necho >> {count}; N=$(wc -l < {count} | tr -d ' ')\n"
        f"cat <<END\n{json.dumps(credential)}\nEND\n"
    )
    script.chmod(0o755)
    path = write_kubeconfig(tmp_path / "config", stub.url, exec_user(str(script)))
    api = KubernetesApi(profile_of(path))
    api.list(JOBS)
    api.list(JOBS)
    assert [r.headers["Authorization"] for r in stub.requests] == ["Bearer t-2", "Bearer t-3"]


def test_a_connection_prints_without_credentials(config: Path) -> None:
    connection = open_connection(profile_of(config))
    assert TOKEN not in repr(connection)
    assert (
        "user:pw"
        not in open_connection(
            profile_of(
                edited(config, lambda c: c["clusters"][0]["cluster"].update(server="https://user:pw@h:1"))
            )
        ).place
    )


def test_the_client_is_imported_when_a_cluster_is_asked_and_without_what_it_does_not_need(
    config: Path,
) -> None:
    script = (
        "import sys; from launcher.backends.kubernetes_api import KubernetesApi\n"
        "from launcher.profiles import Profile; from pathlib import Path\n"
        "assert not {'kubernetes', 'urllib3', 'yaml'} & set(sys.modules)\n"
        f"KubernetesApi(Profile(name='lab', backend='kubernetes', kubeconfig=Path({str(config)!r})))\n"
        "assert 'kubernetes.client' in sys.modules\n"
        "assert not {'google.auth', 'kubernetes_validate', 'jsonschema'} & set(sys.modules)\n"
        "assert not {'oauthlib', 'requests_oauthlib', 'requests', 'websocket'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_the_client_was_imported_without_is_there_once_it_is_used() -> None:
    script = (
        "import sys; from launcher.backends.client_imports import client_classes\n"
        "client_classes(); import kubernetes; from kubernetes.config import kube_config\n"
        "before = {'oauthlib', 'requests_oauthlib', 'requests', 'websocket'} & set(sys.modules)\n"
        "session = kube_config.OAuth2Session(client_id='a', token={'refresh_token': 'b'})\n"
        "error = kube_config.oauthlib.oauth2.rfc6749.errors.InvalidClientIdError\n"
        "call = kubernetes.stream.stream\n"
        "import kubernetes.stream, oauthlib.oauth2, requests_oauthlib\n"
        "assert not before and isinstance(session, requests_oauthlib.OAuth2Session)\n"
        "assert error is oauthlib.oauth2.InvalidClientIdError and call is kubernetes.stream.stream\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_client_that_uses_at_once_what_was_put_off_is_imported_all_the_same(tmp_path: Path) -> None:
    modules = {
        "__init__": "from . import stream",
        "stream": "import requests",
        "client/__init__": "",
        "client/api_client": "ApiClient = 1",
        "client/configuration": "Configuration = 2",
        "config": "import oauthlib.oauth2\nclass ConfigException(oauthlib.oauth2.OAuth2Error): pass\n"
        "from kubernetes.stream import requests\nload_incluster_config, load_kube_config = 3, 4",
    }
    for name, text in modules.items():
        path = tmp_path / "kubernetes" / f"{name}.py"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(text)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from launcher.backends.client_imports import client_classes\n"
        "classes = client_classes()\n"
        "assert (classes.ApiClient, classes.load_kube_config) == (1, 4)\n"
        "import oauthlib.oauth2; assert issubclass(classes.ConfigException, oauthlib.oauth2.OAuth2Error)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (api_path("batch/v1", "jobs", namespace="lab", name="a"), "jobs.batch 'a' in namespace 'lab'"),
        (api_path("v1", "pods", namespace="l", name="a", subresource="log"), "pods/log 'a' in namespace 'l'"),
        (api_path("v1", "namespaces", name="lab"), "namespaces 'lab'"),
        (api_path("v1", "nodes"), "nodes"),
        (api_path("scheduling.run.ai/v2", "queues", name="a"), "queues.scheduling.run.ai 'a'"),
        ("/version", "/version"),
    ],
)  # fmt: skip
def test_a_path_in_words(path: str, words: str) -> None:
    assert str(Target.of(path)) == words
