"""What an API server of Kubernetes says no with, as the launcher's errors.

::

    BackendError
     +-- ApiError             any answer that is no success, or none at all
          +-- ApiNotFound     404: no such object, or no such kind of object
          +-- ApiConflict     409: the name is taken, or the object changed meanwhile
          +-- ApiForbidden    401, 403: who we are, or what we may do
          +-- ApiRefused      403: a policy, a quota or a namespace that ends; the right is there
          +-- ApiInvalid      400, 422: the object is not acceptable; the fields are named
          +-- ApiUnanswered   no connection, a time-out, 429, 5xx: asking again may help

Texts of the server are shown, headers never: they hold the token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, unquote

from launcher.errors import BackendError
from launcher.secrets import redacted

CHART = "charts/influence"
_CHART_OPTIONS = {
    "rayjobs.ray.io": "kuberay.enabled",
    "rayclusters.ray.io": "kuberay.enabled",
    "workloads.kueue.x-k8s.io": "kueue.enabled",
    "localqueues.kueue.x-k8s.io": "kueue.enabled",
    "nodes": "nodeViewer.enabled",
}
_LONGEST_TEXT = 2000
_VERBS = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}
_MISSING_RIGHT = re.compile(r"\bcannot \w+ (resource|path)\b")  # how authorization says no
_PATH = re.compile(
    r"/(?:api|apis/(?P<group>[^/]+))/(?P<version>[^/]+)"
    r"(?:/namespaces/(?P<namespace>[^/]+)(?=/))?"
    r"/(?P<resource>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<subresource>[^/]+))?)?"
)


class ApiError(BackendError):
    """The API server did not do what was asked.

    Attributes:
        status: the HTTP status; None where there was no answer.
        reason: the server's own word, such as ``AlreadyExists``; empty where it gave none.
    """

    status: int | None = None
    reason: str = ""


class ApiNotFound(ApiError):  # noqa: N818 - these say what the server said
    pass


class ApiConflict(ApiError):  # noqa: N818
    @property
    def already_exists(self) -> bool:
        """Whether the name is taken; otherwise the object changed between reading and writing."""
        return self.reason == "AlreadyExists"


class ApiForbidden(ApiError):  # noqa: N818
    pass


class ApiRefused(ApiError):  # noqa: N818
    pass


class ApiInvalid(ApiError):  # noqa: N818
    pass


class ApiUnanswered(ApiError):  # noqa: N818
    """Asking again may help.

    Attributes:
        perhaps_done: whether the server may have carried the request out all the same.
        retry_after_s: how long the server wants to be left alone, where it said so.
        hopeless: whether asking again soon cannot help after all (a certificate that is not trusted).
    """

    perhaps_done: bool = False
    retry_after_s: float | None = None
    hopeless: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What a path of the API stands for."""

    group: str
    resource: str
    namespace: str | None = None
    name: str | None = None
    subresource: str | None = None

    @classmethod
    def of(cls, path: str) -> Target:
        match = _PATH.fullmatch(path)
        if match is None:
            return cls("", path)
        parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        return cls(
            parts.get("group", ""), parts["resource"], parts.get("namespace"), parts.get("name"),
            parts.get("subresource"),
        )  # fmt: skip

    @property
    def is_resource(self) -> bool:
        """Whether it is an object or a collection, not ``/version`` or ``/apis/batch/v1``."""
        return not self.resource.startswith("/")

    @property
    def kind(self) -> str:
        """``jobs.batch``, ``pods/log``: as ``kubectl auth can-i`` takes it."""
        below = f"/{self.subresource}" if self.subresource else ""
        return f"{self.resource}{'.' + self.group if self.group else ''}{below}"

    def __str__(self) -> str:
        name = f" '{self.name}'" if self.name else ""
        return f"{self.kind}{name}{self.place}"

    @property
    def place(self) -> str:
        return f" in namespace '{self.namespace}'" if self.namespace else ""


def api_path(
    group_version: str,
    resource: str,
    *,
    namespace: str | None = None,
    name: str | None = None,
    subresource: str | None = None,
) -> str:
    """The path of an object or a collection: ``/apis/batch/v1/namespaces/lab/jobs/infl-smoke``.

    Args:
        group_version: ``batch/v1``; ``v1`` for the core group.
        resource: the plural: ``jobs``.
        namespace: None for what lies in no namespace, or for all namespaces.
    """
    words = ["apis" if "/" in group_version else "api", *group_version.split("/")]
    if namespace is not None:
        words += ["namespaces", namespace]
    words += [word for word in (resource, name, subresource) if word is not None]
    return "/" + "/".join(quote(word, safe="") for word in words)


def refusal(
    place: str, method: str, path: str, status: int, body: bytes, retry_after: str | None
) -> ApiError:
    """An answer of 400 or more as an error.

    Args:
        place: the API server, for a person.
        body: a ``Status`` object; anything else where a proxy answered.
        retry_after: the header of that name.
    """
    told = _status_object(body)
    message = _text(told.get("message") or _plain(body))
    target = Target.of(path)
    doing = f"{_verb(method, target)} {target}"
    error = _by_status(place, doing, target, method, status, told, message)
    error.status = status
    error.reason = str(told.get("reason") or "")
    if isinstance(error, ApiUnanswered):
        error.perhaps_done = status != 429
        error.retry_after_s = _seconds(retry_after)
    return error


def _by_status(
    place: str, doing: str, target: Target, method: str, status: int, told: dict[str, Any], message: str
) -> ApiError:
    if status == 401:
        return ApiForbidden(
            f"{place} does not accept your credentials",
            why=message or "they are missing, wrong or have expired",
            next_step="log in again, then try `kubectl auth whoami` with the same kubeconfig and context",
        )
    if status == 403:
        return _forbidden(place, doing, target, method, message)
    if status == 404:
        return ApiNotFound(f"{place} has no {target}", why=message)
    if status == 409:
        return ApiConflict(f"{place} could not {doing}: it exists, or has just changed", why=message)
    if status in (400, 413, 422):
        return ApiInvalid(
            f"{place} does not accept what it was sent to {doing}",
            why=_fields(told) or message,
            next_step="correct the setting that the field comes from; `launcher render` prints the object",
        )
    if status == 429 or status >= 500:
        busy = "is too busy" if status == 429 else "failed"
        return ApiUnanswered(
            f"{place} {busy} (HTTP {status}) when asked to {doing}",
            why=message,
            next_step="try again in a minute; when it lasts, tell the cluster's administrator",
        )
    return ApiError(f"{place} answered HTTP {status} when asked to {doing}", why=message)


def chart_role(kind: str) -> str:
    """The role that has the rights to a kind of object, in words, with the chart's option that it takes.

    Args:
        kind: as ``Target.kind``: ``rayjobs.ray.io``.
    """
    option = _CHART_OPTIONS.get(kind)
    return f"the launcher's role, which the chart {CHART} makes" + (f" with {option}=true" if option else "")


def _verb(method: str, target: Target) -> str:
    return _VERBS.get(method) or ("get" if target.name else "list")


def _forbidden(place: str, doing: str, target: Target, method: str, message: str) -> ApiError:
    """A 403 of authorization, or of admission: that comes after it, and looks at changes only."""
    verb, within = _verb(method, target), f" -n {target.namespace}" if target.namespace else ""
    if _MISSING_RIGHT.search(message):
        return ApiForbidden(
            f"{place} does not let you {doing}",
            why=f"the right '{verb}' on '{target.kind}'{target.place} is missing ({message})",
            next_step=f"ask the cluster's administrator to bind you to {chart_role(target.kind)}; "
            f"`kubectl auth can-i {verb} {target.kind}{within}` then says yes",
        )
    if not message or method not in _VERBS:
        return ApiForbidden(
            f"{place} does not let you {doing}",
            why=message or "it does not say why; perhaps a proxy answered in its place",
            next_step=f"see what `kubectl auth can-i {verb} {target.kind}{within}` says with the same "
            "kubeconfig and context",
        )
    if "exceeded quota" in message:
        return ApiRefused(
            f"{place} refuses to {doing}: a quota is used up",
            why=message,
            next_step="wait until other work ends, or ask the namespace's administrator for a larger quota",
        )
    if "being terminated" in message:
        return ApiRefused(
            f"{place} refuses to {doing}: the namespace is being deleted",
            why=message,
            next_step="ask the administrator to make it anew, or choose another with cluster.namespace",
        )
    return ApiRefused(
        f"{place} refuses to {doing}",
        why=message,
        next_step="correct the setting that it speaks of, or ask the cluster's administrator about that rule",
    )


def _status_object(body: bytes) -> dict[str, Any]:
    try:
        told = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) and told.get("kind") == "Status" else {}


def _plain(body: bytes) -> str:
    """A proxy's page or the API server's bare line; HTML says nothing worth showing."""
    text = body[:_LONGEST_TEXT].decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text


def _text(text: Any) -> str:
    return redacted(str(text)[:_LONGEST_TEXT].strip())


def _fields(told: dict[str, Any]) -> str | None:
    """The fields that are wrong, a line each."""
    details = told.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    if not isinstance(causes, list):
        return None
    lines = [
        f"{cause.get('field') or '(object)'}: {_text(cause.get('message', ''))}"
        for cause in causes
        if isinstance(cause, dict)
    ]
    return "\n".join(lines) or None


def _seconds(text: str | None) -> float | None:
    """Retry-After in seconds; its other form, a date, is not one that API servers send."""
    try:
        return max(0.0, float(text)) if text is not None else None
    except ValueError:
        return None
