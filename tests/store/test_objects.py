"""Objects over real HTTP: whole, verified, tried again."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from influence.store import objects as objects_module
from influence.store.errors import StoreConfigError, StoreError, StoreFullError, StoreOutageError
from influence.store.faults import Kind, fault_of
from influence.store.objects import Objects

from .s3_server import ACCESS_KEY, SECRET_KEY, Answer, Request, S3Server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects_module, "_FIRST_WAIT_S", 0.01)


def puts(server: S3Server) -> list[Request]:
    return [request for request in server.between.requests if request.method == "PUT"]


def test_what_was_put_is_read_back_and_listed(objects: Objects) -> None:
    objects.put("steps/b", b"two")
    objects.create("steps/a", b"one")
    assert objects.read("steps/a") == b"one"
    assert [(entry.key, entry.bytes) for entry in objects.list("steps")] == [("steps/a", 3), ("steps/b", 3)]
    assert objects.list("nothing") == []
    objects.delete(["steps/a", "steps/never"])
    with pytest.raises(FileNotFoundError):
        objects.read("steps/a")


def test_every_upload_carries_its_sha256(objects: Objects, server: S3Server, tmp_path: Path) -> None:
    large = os.urandom(20 * 2**20)
    (tmp_path / "large").write_bytes(large)
    objects.create("small", b"small")
    objects.put("file", tmp_path / "large")
    assert objects.digest("file") == (hashlib.sha256(large).hexdigest(), len(large))
    assert len(puts(server)) > 2  # the large one went in parts
    for request in puts(server):
        digest = base64.b64encode(hashlib.sha256(request.body).digest()).decode()
        assert request.headers["x-amz-checksum-sha256"] == digest


def test_an_object_is_created_once(objects: Objects) -> None:
    objects.create("key", b"first")
    objects.create("key", b"first")  # as after an answer that was lost
    with pytest.raises(FileExistsError):
        objects.create("key", b"other")
    assert objects.read("key") == b"first"


def test_of_many_at_once_one_creates(objects: Objects) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        try:
            objects.create("key", b"%d" % number)
        except FileExistsError:
            return
        won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert objects.read("key") == b"%d" % won[0]


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_that_fails_is_tried_again(objects: Objects, server: S3Server, status: int) -> None:
    left = [3]

    def fail(request: Request) -> Answer | None:
        left[0] -= 1
        return Answer(status, "SlowDown") if left[0] >= 0 else None

    server.between.before = fail
    objects.create("key", b"data")
    assert len(puts(server)) == 4
    assert objects.read("key") == b"data"


def test_an_answer_that_was_lost_does_not_make_a_create_fail(objects: Objects, server: S3Server) -> None:
    lost = []

    def lose(request: Request) -> Answer | None:
        if request.method == "PUT" and not lost:
            lost.append(request)
            return Answer(503, "SlowDown")
        return None

    server.between.after = lose
    objects.create("key", b"data")
    assert len(puts(server)) == 2


def damage(request: Request) -> Request:
    return dataclasses.replace(request, body=b"X" + request.body[1:])


def test_what_is_damaged_on_its_way_is_sent_again(objects: Objects, server: S3Server) -> None:
    damaged = []

    def once(request: Request) -> Request | None:
        if request.method == "PUT" and not damaged:
            damaged.append(request)
            # The server computes the checksum when asked for its algorithm, and compares.
            headers = {**request.headers, "x-amz-sdk-checksum-algorithm": "SHA256"}
            return dataclasses.replace(damage(request), headers=headers)
        return None

    server.between.before = once
    objects.create("key", b"data")
    assert objects.read("key") == b"data"
    assert len(puts(server)) == 2


def test_a_store_that_keeps_other_bytes_is_found_out(objects: Objects, server: S3Server) -> None:
    def keep_other_bytes(request: Request) -> Request | None:
        if request.method != "PUT":
            return None
        headers = {k: v for k, v in request.headers.items() if not k.startswith("x-amz-checksum")}
        return dataclasses.replace(damage(request), headers=headers)

    server.between.before = keep_other_bytes
    with pytest.raises(StoreError, match="does not keep what it is sent"):
        objects.put("key", b"data")
    with pytest.raises(StoreError, match="does not keep what it is sent"):
        objects.create("other", b"data")


CONFIG = {
    "InvalidAccessKeyId": (403, "access key is unknown"),
    "SignatureDoesNotMatch": (403, "secret key does not fit"),
    "ExpiredToken": (400, "has expired"),
    "AccessDenied": (403, "access is denied"),
    "NoSuchBucket": (404, "no such bucket"),
    "NotImplemented": (501, "conditional puts"),
    "PermanentRedirect": (301, "region or the endpoint"),
    "MethodNotAllowed": (405, "the request is refused"),
}


@pytest.mark.parametrize(("code", "expected"), CONFIG.items(), ids=CONFIG)
def test_what_a_person_must_mend_is_not_tried_again(
    objects: Objects, server: S3Server, code: str, expected: tuple[int, str]
) -> None:
    status, words = expected
    server.between.before = lambda request: Answer(status, code, f"key {SECRET_KEY} of {ACCESS_KEY}")
    calls: list[Callable[[], object]] = [
        lambda: objects.create("key", b"data"),
        lambda: objects.put("key", b"data"),
        lambda: objects.read("key"),
        lambda: objects.list("folder"),
    ]
    for call in calls:
        server.between.requests.clear()
        with pytest.raises(StoreConfigError, match=words) as caught:
            call()
        assert len(server.between.requests) == 1
        said = f"{caught.value!s} {caught.value!r} {caught.value.__cause__!r}"
        assert SECRET_KEY not in said
        assert ACCESS_KEY not in said
        assert caught.value.__suppress_context__


def test_without_keys_and_without_an_identity_of_the_machine_it_says_so() -> None:
    error = OSError(
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token - HTTP error: time"
    )
    fault = fault_of(error)
    assert (fault.kind, fault.reason) == (Kind.CONFIG, "there are no credentials")
    assert "AWS_ACCESS_KEY_ID" in fault.next_step


def test_without_its_client_a_store_cannot_be_opened(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(StoreConfigError, match=r"influence-launcher\[store\]"):
        Objects(url)


def test_a_full_store_says_so(objects: Objects, server: S3Server) -> None:
    server.between.before = lambda request: Answer(507, "XMinioStorageFull")
    with pytest.raises(StoreFullError, match="no room is left"):
        objects.put("key", b"data")


@pytest.mark.parametrize("was_reached", [False, True])
def test_an_outage_ends_with_patience_and_knows_whether_it_ever_worked(
    url: str, server: S3Server, was_reached: bool
) -> None:
    objects = Objects(f"{url}/run", patience_s=0.2)
    if was_reached:
        objects.put("before", b"")
    server.between.before = lambda request: Answer(503, "SlowDown")
    with pytest.raises(StoreOutageError, match="503") as caught:
        objects.put("key", b"data")
    assert caught.value.was_reached is was_reached
    assert "s3://" in str(caught.value)


@pytest.mark.parametrize(
    ("endpoint", "words"),
    [("http://127.0.0.1:9", "refused|no connection"), ("http://no.such.host.invalid", "name|no connection")],
)
def test_nobody_there(url: str, monkeypatch: pytest.MonkeyPatch, endpoint: str, words: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StoreOutageError, match=words):
        Objects(url, patience_s=0.1).list("")


def test_a_time_that_is_up_ends_the_waiting_of_other_threads(url: str, server: S3Server) -> None:
    objects = Objects(f"{url}/run", patience_s=600)
    server.between.before = lambda request: Answer(503)
    caught: list[BaseException] = []

    def put() -> None:
        try:
            objects.put("key", b"data")
        except StoreOutageError as error:
            caught.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    while len(server.between.requests) < 2:
        time.sleep(0.01)
    objects.hurry(time.monotonic() + 0.1)
    thread.join(30)
    assert caught


def test_a_store_that_ignores_conditions_is_told_from_one_that_does_not(
    objects: Objects, server: S3Server
) -> None:
    objects.put("key", b"data")
    assert not objects.ignores_conditions("key", b"data")

    def ignore(request: Request) -> Request:
        headers = {name: value for name, value in request.headers.items() if name != "if-none-match"}
        return dataclasses.replace(request, headers=headers)

    server.between.before = ignore
    assert objects.ignores_conditions("key", b"data")
    assert objects.read("key") == b"data"


@pytest.mark.parametrize("bad", ["s3://AKIA:secret@bucket/x", "s3://bucket/x?token=secret"])
def test_a_url_with_credentials_is_refused_and_not_shown(bad: str) -> None:
    with pytest.raises(StoreConfigError, match="carries credentials") as caught:
        Objects(bad)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("bad", ["nonsense", "ftp://bucket/x", "", "s3://"])
def test_what_is_no_store_is_refused(bad: str) -> None:
    with pytest.raises(StoreConfigError):
        Objects(bad)
