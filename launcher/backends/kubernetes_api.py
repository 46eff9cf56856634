"""A thin layer over a cluster's API: plain JSON, and the one place for retries and watches."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from time import monotonic, sleep
from typing import Any, Literal, TypeVar

from launcher.backends.kubernetes_connection import Connection, open_connection
from launcher.backends.kubernetes_errors import ApiError, ApiNotFound, ApiUnanswered, Target, api_path
from launcher.profiles import Profile

MAX_TRIES = 5
MAX_RETRYING_S = 30.0
_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 5.0
# A watch ends by itself after this long and is opened again: some proxies drop longer ones silently.
_WATCH_S = 240.0
_SILENCE_S = 60.0  # of a stream; then it is taken for dead, and opened again

_PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
}

Object = dict[str, Any]
_Body = Object | list[Object]
_T = TypeVar("_T")


class KubernetesApi:
    """The API server of a profile's cluster.

    Paths are those of the REST API (``kubernetes_errors.api_path`` makes them); objects are plain JSON. Every
    call has a time-out to connect and one for silence. What may be asked again is, after waits with full
    jitter, within ``MAX_TRIES`` tries and ``MAX_RETRYING_S`` seconds; ``Retry-After`` is honoured.

    Args:
        profile: which cluster, as whom.
        connection: used instead of the one that the profile's kubeconfig describes.

    Raises:
        BackendError: the kubeconfig cannot be used.
    """

    def __init__(self, profile: Profile, connection: Connection | None = None) -> None:
        connection = connection or open_connection(profile)
        from launcher.backends.kubernetes_transport import Transport

        self._transport = Transport(connection)
        self.place = connection.place
        """The API server, for a person."""

    def now_s(self) -> float:
        """Unix time in seconds by the server's clock, which all times in its objects come from."""
        return self._transport.clock.now_s()

    def get(self, path: str) -> Object:
        """One object; or what a path that is no resource answers: ``/version``, ``/apis/ray.io/v1``.

        Raises:
            ApiNotFound, ApiForbidden, ApiUnanswered: see ``launcher.backends.kubernetes_errors``.
        """
        return self._asked(lambda: self._transport.call("GET", path), partial(_object_at, path))

    def list(self, path: str, **query: str | int) -> Object:
        """A collection in one answer: ``items`` and ``metadata.resourceVersion``; raises as ``get``.

        Args:
            query: the API's own parameters: ``labelSelector="infl/run"``.
        """
        return self._asked(lambda: self._transport.call("GET", path, query), _collection)

    def create(self, path: str, body: Object) -> Object:
        """Create the object ``body`` in the collection ``path``.

        Where the answer was lost or an error, the object is looked for before it is sent again, so the object
        that is returned may be one that somebody else created meanwhile.

        Raises:
            ApiConflict: the name is taken.
            ApiInvalid, ApiForbidden, ApiUnanswered: it was not created.
        """

        def found() -> Object | None:
            try:
                return self.get(f"{path}/{body['metadata']['name']}")
            except ApiNotFound:
                return None

        return self._asked(
            lambda: self._transport.call("POST", path, body=body), partial(_object_at, path), in_doubt=found
        )

    def ask(self, path: str, body: Object, **query: str | int) -> Object:
        """POST something that creates nothing: a ``SelfSubjectAccessReview``, or anything with ``dryRun``.

        Raises:
            ApiError: as ``create``.
        """
        return self._asked(
            lambda: self._transport.call("POST", path, query, body=body), partial(_of_kind, path)
        )

    def patch(
        self,
        path: str,
        body: _Body,
        kind: Literal["merge", "strategic", "json"] = "merge",
    ) -> Object:
        """Change an object, and get it as it is then.

        It is sent again where the answer was lost, so it must do no harm twice. A merge patch that names a
        ``metadata.resourceVersion`` holds only for that version of the object.

        Raises:
            ApiConflict: the object has another version.
            ApiNotFound, ApiInvalid, ApiForbidden, ApiUnanswered: as for ``get`` and ``create``.
        """
        return self._asked(
            lambda: self._transport.call("PATCH", path, body=body, content_type=_PATCH_TYPES[kind]),
            partial(_object_at, path),
        )

    def watch(self, path: str, *, timeout_s: float, **query: str | int) -> Iterator[Mapping[str, Object]]:
        """The objects of a collection by name: as they are, then again after every change, for a while.

        Goes on through closed connections, a server that was restarted, and versions that it no longer knows
        (410: the collection is listed again). So the last state is always seen, though not every one before.
        An object that is gone is missing from the next mapping.

        Args:
            timeout_s: how long to look.
            query: selectors, as for ``list``.

        Raises:
            ApiForbidden, ApiNotFound: the right is missing, or there is no such collection.
            ApiUnanswered: the server was away when the time was up.
        """
        deadline = monotonic() + timeout_s
        version: str | None = None
        objects: dict[str, Object] = {}
        while (left_s := deadline - monotonic()) > 0:
            started = monotonic()
            try:
                if version is None:
                    listed = self.list(path, **query)
                    objects = {item["metadata"]["name"]: item for item in listed["items"]}
                    version = str(listed["metadata"]["resourceVersion"])
                    yield dict(objects)
                for kind, item in self._changes(path, version, left_s, query):
                    name, version = item["metadata"].get("name"), str(item["metadata"]["resourceVersion"])
                    if kind == "BOOKMARK":
                        continue
                    if kind == "DELETED":
                        objects.pop(name, None)
                    else:
                        objects[name] = item
                    yield dict(objects)
            except _GoneError:
                version = None
            except ApiUnanswered as error:
                if error.hopeless or monotonic() + _LONGEST_WAIT_S > deadline:
                    raise
            # A server that is away, or closes every watch at once, is not asked in a tight loop.
            if monotonic() - started < 1:
                sleep(random.uniform(_FIRST_WAIT_S, 1))

    def _changes(
        self, path: str, version: str, left_s: float, query: Mapping[str, str | int]
    ) -> Iterator[tuple[str, Object]]:
        """One watch until it ends, for whatever reason; a last line that was cut off is not used."""
        asked = {
            **query, "watch": "1", "allowWatchBookmarks": "1", "resourceVersion": version,
            "timeoutSeconds": max(1, int(min(left_s, _WATCH_S))),
        }  # fmt: skip
        try:
            pieces = self._transport.pieces(path, asked, read_timeout_s=max(1.0, min(left_s, _SILENCE_S)))
        except ApiError as error:
            if error.status == 410:
                raise _GoneError from None
            raise
        for line in filter(None, _whole_lines(pieces)):
            try:
                change = json.loads(line)
                kind, item = change["type"], change["object"]
                item["metadata"]["resourceVersion"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise _GoneError from None  # an ERROR, mostly 410: a new list shows what is
            if kind == "ERROR":
                raise _GoneError
            yield kind, item

    def stream_log(
        self,
        namespace: str,
        pod: str,
        *,
        container: str,
        since_time: str | None = None,
        follow: bool = False,
        timestamps: bool = True,
    ) -> Iterator[bytes]:
        """What a container printed, in pieces of whatever size, until it ends.

        Args:
            since_time: RFC 3339; the API cuts it to whole seconds.
            follow: wait for more while the container runs.

        Raises:
            ApiNotFound: no such pod.
            ApiInvalid: the container has not started.
            ApiForbidden: as for ``get``.
            ApiUnanswered: likewise, and when the connection breaks or is silent for a minute; ``since_time``
                goes on from there.
        """
        query: dict[str, str | int] = {"container": container}
        flags = {"timestamps": timestamps, "follow": follow}
        query |= {name: "true" for name, wanted in flags.items() if wanted}
        if since_time is not None:
            query["sinceTime"] = since_time
        path = api_path("v1", "pods", namespace=namespace, name=pod, subresource="log")
        return _retrying(lambda: self._transport.pieces(path, query, accept="*/*", read_timeout_s=_SILENCE_S))

    def _asked(
        self,
        send: Callable[[], bytes],
        checked: Callable[[Any], Object],
        *,
        in_doubt: Callable[[], Object | None] = lambda: None,
    ) -> Object:
        """An answer of the shape that the API gives. Whatever else answers (a proxy, a login page) has told
        nothing, least of all that something is not there."""

        def once() -> Object:
            try:
                answer = checked(json.loads(send()))
            except (ValueError, RecursionError) as error:
                reason = str(error) if isinstance(error, _ShapeError) else "no JSON"
            else:
                _drop_managed_fields(answer)
                return answer
            told = ApiUnanswered(
                f"{self.place} answered with something that is no answer of the Kubernetes API: {reason}",
                why="perhaps a proxy or a login page answered in its place",
                next_step="try again; when it lasts, check the server's address in the kubeconfig",
            )
            told.perhaps_done = True
            raise told

        return _retrying(once, in_doubt=in_doubt)


class _ShapeError(ValueError):
    """What an answer lacks."""


def _object_at(path: str, answer: Any) -> Object:
    """An object with a name; of what is no resource (``/version``), anything."""
    item = _of_kind(path, answer)
    if Target.of(path).is_resource and not _is_named(item):
        raise _ShapeError("an object without a name")
    return item


def _of_kind(path: str, answer: Any) -> Object:
    """An object of the kind that the path names; a review, for one, has no name."""
    if not isinstance(answer, dict):
        raise _ShapeError("no JSON object")
    target = Target.of(path)
    if target.is_resource:
        kind = answer.get("kind")
        # The plural begins with the kind's name: priorityclasses, jobs.
        if not isinstance(kind, str) or not kind or not target.resource.startswith(kind.lower()):
            raise _ShapeError(f"no object of {target.kind}")
    return answer


def _collection(answer: Any) -> Object:
    """A list with its version, of objects with names."""
    if not isinstance(answer, dict) or not str(answer.get("kind")).endswith("List"):
        raise _ShapeError("no list of objects")
    items, metadata = answer.get("items"), answer.get("metadata")
    if not isinstance(metadata, dict) or not isinstance(metadata.get("resourceVersion"), str):
        raise _ShapeError("a list without a version")
    if items is None:  # as some servers write an empty one
        items = answer["items"] = []
    if not isinstance(items, list) or not all(map(_is_named, items)):
        raise _ShapeError("a list of something else than objects")
    return answer


def _is_named(item: Any) -> bool:
    metadata = item.get("metadata") if isinstance(item, dict) else None
    return isinstance(metadata, dict) and isinstance(metadata.get("name"), str)


def _whole_lines(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The lines of a stream until it ends or breaks; what follows the last line end is left out."""
    rest = b""
    try:
        for piece in pieces:
            *lines, rest = (rest + piece).split(b"\n")
            yield from lines
    except ApiUnanswered:
        return


def _drop_managed_fields(answer: Object) -> None:
    """Of an object, or of every item of a list: who wrote which field is a third of it, and nobody asks."""
    items = answer.get("items")
    for item in (answer, *(items if isinstance(items, list) else ())):
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if isinstance(metadata, dict):
            metadata.pop("managedFields", None)


class _GoneError(Exception):
    """The server cannot tell what changed since that version."""


def _retrying(once: Callable[[], _T], *, in_doubt: Callable[[], _T | None] = lambda: None) -> _T:
    """Call ``once`` until it is answered.

    Args:
        in_doubt: asked after a try that may have been carried out; what it finds is the answer.
    """
    deadline = monotonic() + MAX_RETRYING_S
    for number in range(MAX_TRIES):
        try:
            return once()
        except ApiUnanswered as error:
            if error.perhaps_done and (found := in_doubt()) is not None:
                return found
            wait_s = error.retry_after_s
            if wait_s is None:
                wait_s = random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**number))
            if error.hopeless or number + 1 == MAX_TRIES or monotonic() + wait_s > deadline:
                raise
            sleep(wait_s)
    raise AssertionError("the last try returns or raises")
