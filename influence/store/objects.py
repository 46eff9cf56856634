"""Objects below one URL: whole or not at all, verified, tried again while a store is slow or away.

What a put returned for is there with these bytes: the server has checked their SHA-256 on arrival, and we
look afterwards. Everything here may be called from several threads.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from influence.store.errors import StoreConfigError, StoreError, StoreFullError, StoreOutageError
from influence.store.faults import Fault, Kind, fault_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore as Client

PATIENCE_S = 600.0
"""How long a store may be away before a run stops."""

_SMALL_BYTES = 2**20
_RANGE_BYTES = 2**24
_SMALL_TIMEOUT_S = 20
_LARGE_TIMEOUT_S = 300
_CONNECT_TIMEOUT_S = 10
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 15.0
_HURRIED_WAIT_S = 0.5
_MAX_DAMAGED = 4
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Entry:
    """An object as a listing names it."""

    key: str
    bytes: int
    etag: str | None
    """Changes with the content; nothing else is to be read from it."""


class Objects:
    """The objects below a URL.

    Args:
        url: ``s3://bucket/folder``; a store of another kind must have put-if-absent, too.
        environment: where an endpoint may be named; credentials are the client's own business.
        patience_s: for how long one operation is tried.

    Raises:
        StoreConfigError: no such kind of store, or its client is not installed.
    """

    def __init__(
        self, url: str, environment: Mapping[str, str] | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        self.url = _shown(url)
        self._patience_s = patience_s
        self._give_up_at = float("inf")
        self._hurry = threading.Event()
        self.was_reached = False
        environment = os.environ if environment is None else environment
        self._small = self._client(url, environment, _SMALL_TIMEOUT_S)
        self._large = self._client(url, environment, _LARGE_TIMEOUT_S)

    def _client(self, url: str, environment: Mapping[str, str], timeout_s: int) -> Client:
        try:
            from obstore import store
        except ImportError:
            raise StoreConfigError(
                self.url, "the client of object stores is not installed", "install influence-launcher[store]"
            ) from None
        endpoint = next((environment[name] for name in _ENDPOINTS if environment.get(name)), "")
        options: dict[str, Any] = {
            "timeout": f"{timeout_s}s",
            "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
            "allow_http": endpoint.startswith("http://"),
        }
        config: dict[str, Any] = {}
        if url.startswith("s3://"):  # and not every server of its kind can delete many at once
            config = {"checksum_algorithm": "sha256", "disable_bulk_delete": True}
        try:
            # We try again ourselves: nobody else knows when time is up.
            open_url: Any = store.from_url  # its overloads are by kind of store
            client: Client = open_url(
                url, config=config, client_options=options, retry_config={"max_retries": 0}
            )
        except Exception as error:
            raise StoreConfigError(
                self.url,
                f"no object store can be opened under this URL ({type(error).__name__})",
                "write s3://bucket/folder in cluster.object_store",
            ) from None
        return client

    def hurry(self, give_up_at: float) -> None:
        """From now on nothing is tried after ``give_up_at`` (of `time.monotonic`)."""
        self._give_up_at = min(self._give_up_at, give_up_at)
        self._hurry.set()

    def read(self, key: str) -> bytes:
        """An object's bytes.

        Raises:
            FileNotFoundError: there is none. StoreError: it cannot be read.
        """
        return self._try(key, lambda: bytes(self._large.get(key).bytes()))

    def digest(self, key: str, write: Callable[[bytes], object] = lambda chunk: None) -> tuple[str, int]:
        """SHA-256 in hexadecimal digits and size of an object, passed on to ``write``; raises as `read`."""
        num_bytes = self.size(key)
        digest = hashlib.sha256()
        for start in range(0, num_bytes, _RANGE_BYTES):
            end = min(start + _RANGE_BYTES, num_bytes)
            chunk = self._try(key, lambda s=start, e=end: bytes(self._large.get_range(key, start=s, end=e)))  # type: ignore[misc]
            digest.update(chunk)
            write(chunk)
        return digest.hexdigest(), num_bytes

    def size(self, key: str) -> int:
        """An object's size in bytes; raises as `read`."""
        return self._try(key, lambda: int(self._small.head(key)["size"]))

    def list(self, folder: str) -> list[Entry]:
        """The objects below a folder, by key; none where there is no such folder."""

        def entries() -> list[Entry]:
            pages = self._small.list(folder)
            return [Entry(item["path"], item["size"], item["e_tag"]) for page in pages for item in page]

        return sorted(self._try(folder, entries), key=lambda entry: entry.key)

    def create(self, key: str, data: bytes) -> None:
        """Write an object that is not there yet. One that is there with these very bytes is taken for ours:
        an answer was lost, or another wrote the same.

        Raises:
            FileExistsError: it is there with other bytes. StoreError: it cannot be written.
        """
        client = self._client_for(len(data))
        try:
            self._try(key, lambda: client.put(key, data, mode="create", use_multipart=False))
        except FileExistsError:
            if self.holds(key, data):
                return
            raise
        if not self._arrived(key, data):
            raise self._not_kept(key)

    def put(self, key: str, data: bytes | Path) -> None:
        """Write an object, over what is there.

        Args:
            data: bytes, or a file, which is sent in parts; its first error of the filesystem is an OSError.
        """
        num_bytes = data.stat().st_size if isinstance(data, Path) else len(data)
        client = self._client_for(num_bytes)
        for _ in range(_MAX_DAMAGED):
            self._try(key, lambda: client.put(key, data, chunk_size=_RANGE_BYTES, max_concurrency=4))
            if self._arrived(key, data):
                return
        raise self._not_kept(key)

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; one that is not there is fine."""
        for key in keys:
            try:
                self._try(key, lambda key=key: self._small.delete(key))  # type: ignore[misc]
            except FileNotFoundError:
                continue

    def ignores_conditions(self, key: str, data: bytes) -> bool:
        """Whether a put on condition that ``key`` is absent goes through although it holds ``data``."""
        try:
            self._try(key, lambda: self._small.put(key, data, mode="create", use_multipart=False))
        except FileExistsError:
            return False
        return True

    def holds(self, key: str, data: bytes) -> bool:
        """Whether an object is there and has these bytes."""
        try:
            return self.digest(key) == (hashlib.sha256(data).hexdigest(), len(data))
        except FileNotFoundError:
            return False

    def _client_for(self, num_bytes: int) -> Client:
        return self._small if num_bytes <= _SMALL_BYTES else self._large

    def _arrived(self, key: str, data: bytes | Path) -> bool:
        """A look at what was put: all of a small object, the size of a large one."""
        try:
            if isinstance(data, bytes) and len(data) <= _SMALL_BYTES:
                return self.read(key) == data
            return self.size(key) == (data.stat().st_size if isinstance(data, Path) else len(data))
        except FileNotFoundError:
            return False

    def _not_kept(self, key: str) -> StoreError:
        return StoreError(
            f"{self.url}/{key}", "the store does not keep what it is sent", "ask whoever runs the store"
        )

    def _try(self, key: str, operation: Callable[[], _T]) -> _T:
        """An operation, again and again while it fails for a reason that may pass.

        The waits double, each drawn between nothing and its bound, so that pods do not come back in step.
        """
        from obstore.exceptions import AlreadyExistsError

        give_up_at = time.monotonic() + self._patience_s
        longest_s = _FIRST_WAIT_S
        while True:
            try:
                result = operation()
            except AlreadyExistsError:
                self.was_reached = True
                raise FileExistsError(key) from None
            except Exception as error:
                fault = _fault_unless_ours(error)
                if fault is None:
                    raise
                if fault.kind is not Kind.TRANSIENT:
                    self.was_reached = self.was_reached or fault.kind is Kind.ABSENT
                    raise self._translated(key, fault) from None
                wait_s = random.uniform(0, longest_s)
                if time.monotonic() + wait_s >= min(give_up_at, self._give_up_at):
                    raise self._translated(key, fault) from None
                self._wait(wait_s)
                longest_s = min(2 * longest_s, _LONGEST_WAIT_S)
            else:
                self.was_reached = True
                return result

    def _wait(self, wait_s: float) -> None:
        if self._hurry.is_set():
            time.sleep(min(wait_s, _HURRIED_WAIT_S))
        else:
            self._hurry.wait(wait_s)

    def _translated(self, key: str, fault: Fault) -> Exception:
        place = f"{self.url}/{key}"
        if fault.kind is Kind.ABSENT:
            return FileNotFoundError(place)
        if fault.kind is Kind.CONFIG:
            return StoreConfigError(self.url, fault.reason, fault.next_step)
        if fault.kind is Kind.FULL:
            return StoreFullError(self.url, fault.reason, fault.next_step)
        return StoreOutageError(self.url, fault.reason, fault.next_step, was_reached=self.was_reached)


def _fault_unless_ours(error: Exception) -> Fault | None:
    """The store's fault; None where the error is of this machine, as when a file cannot be read."""
    is_clients = type(error).__module__.startswith("obstore")
    if is_clients or (isinstance(error, OSError) and error.errno is None):
        return fault_of(error)
    return None


def _shown(url: str) -> str:
    """A URL that may be printed.

    Raises:
        StoreConfigError: it carries a user, so perhaps a password.
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query:
        raise StoreConfigError(
            f"{parts.scheme}://...",
            "the URL of the store carries credentials",
            "leave them out: they come from the environment (AWS_ACCESS_KEY_ID, ...)",
        )
    return url.rstrip("/")
