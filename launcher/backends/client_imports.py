"""The official client's classes, imported without the half of its imports that the launcher never uses.

The client imports at its top what serves single features: OAuth for the auth-provider ``oidc``, WebSockets
and requests for commands in containers, 130 modules together. Here they are imported when they are used.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

# What the client does without where it is not installed. google-auth serves the auth-provider `gcp`, which
# kubectl dropped in 1.26; the other checks what a dynamic client sends.
_NOT_NEEDED = ("google.auth", "kubernetes_validate")
# What it cannot be imported without, and the module to import when something of it is used.
_LATE = {
    "oauthlib": "oauthlib.oauth2",
    "oauthlib.oauth2": "oauthlib.oauth2",
    "requests_oauthlib": "requests_oauthlib",
    "kubernetes.stream": "kubernetes.stream",
}


class ClientClasses(NamedTuple):
    """What the launcher uses of the client."""

    ApiClient: Any
    Configuration: Any
    ConfigException: type[Exception]
    load_incluster_config: Any
    load_kube_config: Any


def client_classes() -> ClientClasses:
    """Import the client, on the first call.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        with _stand_ins():
            return _imported()
    except (ImportError, AttributeError, TypeError):  # a release that needs at once what was put off
        return _imported()


def _imported() -> ClientClasses:
    from kubernetes.client.api_client import ApiClient
    from kubernetes.client.configuration import Configuration
    from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

    return ClientClasses(ApiClient, Configuration, ConfigException, load_incluster_config, load_kube_config)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """In the places of modules that were not imported yet; afterwards anybody can import the real ones."""
    modules: dict[str, Any] = dict.fromkeys(_NOT_NEEDED)  # None: as if not installed
    modules |= {name: _Late(name) for name in _LATE}
    put = {name: module for name, module in modules.items() if name not in sys.modules}
    sys.modules.update(put)
    try:
        yield
    finally:
        for name in put:
            sys.modules.pop(name, None)


class _Late(ModuleType):
    """Stands in for a module until something of it is used.

    A name that is taken while it stands in is a function that calls the real one.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            return lambda *args, **keywords: getattr(_real(self.__name__), name)(*args, **keywords)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    importlib.import_module(_LATE[name])
    return sys.modules[name]
