"""How a cluster's API server is reached: kubeconfig, credentials and TLS, by the official client.

Only its configuration and its connection pool are used: objects stay plain JSON. Its import takes most of a
``status``, so it happens here, once a cluster is really asked.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from launcher.backends.client_imports import client_classes
from launcher.backends.deadline import DeadlineError, within
from launcher.errors import BackendError
from launcher.profiles import Profile
from launcher.secrets import redacted

LOGIN_S = 120.0
"""For a credential plugin, which may send a person to a browser."""
_DEFAULT_KUBECONFIG = Path("~/.kube/config")
_IN_CLUSTER_VARIABLE = "KUBERNETES_SERVICE_HOST"
_SKIP_TLS = "insecure-skip-tls-verify"
_HEADER = re.compile(r"[ -~]+")


@dataclass(frozen=True, slots=True)
class Connection:
    """An API server and what is needed to ask it; prints without credentials."""

    host: str
    """``https://10.0.0.1:6443``."""
    place: str
    """For a person: ``the API server https://10.0.0.1:6443 (context lab)``."""
    pool: Any = field(repr=False)
    """``urllib3.PoolManager`` with the cluster's certificates and the user's."""
    authorization: Callable[[], Mapping[str, str]] = field(repr=False)
    """The headers that say who we are; asked before each request, since tokens expire."""


def open_connection(profile: Profile) -> Connection:
    """The connection that a profile describes; asks nothing of the server yet.

    The kubeconfig is the profile's, else that of KUBECONFIG, else ``~/.kube/config``, else a pod's own
    service account.

    Raises:
        BackendError: no kubeconfig, one that cannot be read, no such context, a credential plugin that is
            missing or fails.
    """
    files = _kubeconfig_files(profile)
    context, verified = _checked_context(files, profile) if files else (None, True)
    client = _client(files, context)
    configuration = client.configuration
    host = str(configuration.host).rstrip("/")
    shown = _shown(host)
    return Connection(
        host=host,
        place=f"the API server {shown}"
        + (f" (context {context}{'' if verified else ', its certificate unchecked'})" if context else ""),
        pool=client.rest_client.pool_manager,
        authorization=lambda: _authorization(configuration),
    )


def _kubeconfig_files(profile: Profile) -> list[Path]:
    """The files to read, in order; empty inside a cluster."""
    if profile.kubeconfig is not None:
        return [profile.kubeconfig.expanduser()]
    named = [Path(part).expanduser() for part in os.environ.get("KUBECONFIG", "").split(os.pathsep) if part]
    if named:
        present = [path for path in named if path.exists()]
        if not present:
            raise BackendError(
                f"KUBECONFIG names {', '.join(map(str, named))}, and there is no such file",
                next_step="correct the variable, or name the file in launcher.yaml: kubeconfig",
            )
        return present
    default = _DEFAULT_KUBECONFIG.expanduser()
    if default.exists():
        return [default]
    if os.environ.get(_IN_CLUSTER_VARIABLE):
        return []
    raise BackendError(
        f"no kubeconfig for the cluster profile '{profile.name}'",
        why=f"KUBECONFIG is not set, and there is no {default}",
        next_step="get one from the cluster's administrator, and name it in launcher.yaml "
        "(kubeconfig: PATH), in KUBECONFIG, or put it there",
    )


def _checked_context(files: Sequence[Path], profile: Profile) -> tuple[str, bool]:
    """The name of the context to use, after whatever can be wrong with it was looked for, and whether its
    cluster's certificate is checked.

    The first file that names something decides, as kubectl has it.
    """
    documents = [_read(path) for path in files]
    shown = ", ".join(map(str, files))
    contexts = _named(documents, "contexts")
    context = profile.context or next(
        (str(document["current-context"]) for document in documents if document.get("current-context")), None
    )
    known = f"it has {', '.join(sorted(contexts))}" if contexts else "it has none"
    if context is None:
        raise BackendError(
            f"{shown}: no current context",
            why=known,
            next_step="name one in launcher.yaml (context: NAME), or `kubectl config use-context NAME`",
        )
    if context not in contexts:
        raise BackendError(
            f"{shown}: no context '{context}'",
            why=known,
            next_step=f"correct the context of cluster profile '{profile.name}'"
            if profile.context
            else "`kubectl config use-context NAME`",
        )
    verified = True
    for section, key in (("clusters", "cluster"), ("users", "user")):
        name = _mapping(contexts[context].get("context")).get(key)
        if name and not (isinstance(name, str) and name in _named(documents, section)):
            raise BackendError(f"{shown}: context '{context}' names the {key} '{name}', which is not there")
        if key == "user" and name:
            _require_plugin(_mapping(_named(documents, "users")[name].get("user")), str(name), shown)
        if key == "cluster" and name:
            verified = _is_verified(_mapping(_named(documents, "clusters")[name].get("cluster")), name, shown)
    return context, verified


def _is_verified(cluster: Mapping[str, Any], name: str, shown: str) -> bool:
    """Whether the server's certificate is checked; the client takes any text, "false" too, for true."""
    skipped = cluster.get(_SKIP_TLS)
    if skipped is not None and not isinstance(skipped, bool):
        raise BackendError(
            f"{shown}: {_SKIP_TLS} of cluster '{name}' must be true or false, without quotes",
            next_step="leave it out, and name the cluster's certificate-authority",
        )
    return not skipped


def _require_plugin(user: Mapping[str, Any], name: str, shown: str) -> None:
    plugin = _mapping(user.get("exec"))
    command = plugin.get("command")
    # One with a slash is relative to the kubeconfig; the client finds it there.
    if isinstance(command, str) and os.sep not in command and shutil.which(command) is None:
        hint = plugin.get("installHint")
        raise BackendError(
            f"{shown}: user '{name}' gets credentials from the program '{command}', which is not installed",
            why=hint.strip() if isinstance(hint, str) else None,
            next_step=f"install '{command}', and put it on PATH",
        )


def _read(path: Path) -> dict[str, Any]:
    import yaml

    if path.exists() and not path.is_file():  # a pipe could be read once only, if ever
        raise BackendError(
            f"{path}: is no kubeconfig: no regular file", next_step="write it to a file, and name that"
        )
    try:
        document = yaml.safe_load(path.read_text())
    except OSError as error:
        raise BackendError(
            f"{path}: cannot be read as a kubeconfig: {error.strerror}",
            next_step="check the path and the file's mode",
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # Without the text around the mistake: it may be a token.
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise BackendError(f"{path}: is no kubeconfig: not valid YAML{line}") from None
    if not isinstance(document, dict):
        raise BackendError(f"{path}: is no kubeconfig: must be one mapping")
    for section in ("contexts", "clusters", "users"):
        if not isinstance(document.get(section), list | None):
            raise BackendError(f"{path}: is no kubeconfig: '{section}' must be a list")
    return document


def _named(documents: Sequence[Mapping[str, Any]], section: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for document in documents:
        for entry in document.get(section) or []:
            if isinstance(entry, dict) and isinstance(entry.get("name"), str):
                found.setdefault(entry["name"], entry)
    return found


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _client(files: Sequence[Path], context: str | None) -> Any:
    """The official client, configured; what goes wrong on the way is one error."""
    classes = client_classes()
    configuration = classes.Configuration()
    configuration.retries = False  # what is asked again is decided in one place
    shown = ", ".join(map(str, files)) or "the pod's service account"
    with _client_complaints() as complaints:
        try:
            if files:
                names = os.pathsep.join(map(str, files))
                within(LOGIN_S, lambda: classes.load_kube_config(names, context, configuration))
            else:
                classes.load_incluster_config(configuration)
            client = classes.ApiClient(configuration)
        except DeadlineError:
            raise _no_login() from None
        except (
            classes.ConfigException,
            OSError,
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise BackendError(
                f"{shown}: cannot be used to reach a cluster", why=redacted(str(error)[:500]) or None
            ) from None
    if complaints:  # a plugin failed: the client says so in its log, and would go on as nobody
        raise BackendError(
            f"{shown}: the credential plugin of context '{context}' gave no credentials",
            why=complaints[0],
            next_step="log in again, then try `kubectl auth whoami` with the same kubeconfig and context",
        )
    return client


def _authorization(configuration: Any) -> dict[str, str]:
    with _client_complaints() as complaints:
        try:
            settings = within(LOGIN_S, configuration.auth_settings)
        except DeadlineError:
            raise _no_login() from None
    if complaints:
        raise BackendError(
            "the credential plugin gave no new credentials",
            why=complaints[0],
            next_step="log in again, then try `kubectl auth whoami` with the same kubeconfig and context",
        )
    value = _mapping(settings.get("BearerToken")).get("value")
    if not value:
        return {}
    value = str(value).strip()
    if not _HEADER.fullmatch(value):  # checked here, since http.client would repeat it in its error
        raise BackendError(
            "the token of the kubeconfig cannot be sent",
            why="it has characters that no token has, such as a line break or a letter with an accent",
            next_step="log in again, or copy the token anew",
        )
    return {"Authorization": value}


def _no_login() -> BackendError:
    return BackendError(
        f"the kubeconfig gave no credentials within {LOGIN_S:.0f} s",
        why="its credential plugin has not ended, or a file that it names cannot be read to the end",
        next_step="log in again, then try `kubectl auth whoami` with the same kubeconfig and context",
    )


@contextmanager
def _client_complaints() -> Iterator[list[str]]:
    """What the client logs as errors instead of raising it."""
    complaints: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "kubernetes" in Path(record.pathname).parts:  # others log too, from threads of their own
                complaints.append(redacted(record.getMessage()[:500]))

    root, handler = logging.getLogger(), Collect(level=logging.ERROR)
    root.addHandler(handler)  # it logs to the root, and would otherwise set that up to print
    try:
        yield complaints
    finally:
        root.removeHandler(handler)


def _shown(host: str) -> str:
    """The server's address without what may stand before the ``@``."""
    try:
        parts = urlsplit(host)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    except ValueError:
        pass
    raise BackendError(
        "the kubeconfig's server is no URL",
        next_step="write the address of the API server, such as https://10.0.0.1:6443",
    )
