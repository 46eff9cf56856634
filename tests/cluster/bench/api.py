"""The Kubernetes API in plain dicts, for the kubelet and for tests; it shares nothing with the launcher's."""

from __future__ import annotations

import base64
import contextlib
import json
import ssl
import tempfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import urllib3
import yaml
from urllib3.exceptions import HTTPError

Json = dict[str, Any]

CORE = "/api/v1"
BATCH = "/apis/batch/v1"
_PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
}


class ApiError(Exception):
    """The server's refusal."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message


class Api:
    """A client with one kubeconfig, usable from several threads.

    Every call raises ApiError where the server refuses, and ConnectionError where it is away.
    """

    def __init__(self, kubeconfig: Path, *, num_connections: int = 32) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        cluster, login = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self.url: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        context = ssl.create_default_context(cadata=authority)
        self._headers = {}
        if "token" in login:
            self._headers["Authorization"] = f"Bearer {login['token']}"
        else:
            _present(context, login)
        self._pool = urllib3.PoolManager(ssl_context=context, maxsize=num_connections, retries=False)

    def get(self, path: str, **query: str) -> Json:
        return self._json("GET", path, query=query)

    def find(self, path: str) -> Json | None:
        """What lies there, or None."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    def items(self, path: str, **query: str) -> list[Json]:
        """The objects of a collection."""
        found: list[Json] = self.get(path, **query)["items"]
        return found

    def create(self, path: str, body: Json) -> Json:
        return self._json("POST", path, body)

    def patch(self, path: str, body: Json, kind: str = "merge") -> Json:
        """``kind``: merge or strategic."""
        return self._json("PATCH", path, body, content_type=_PATCH_TYPES[kind])

    def delete(self, path: str, body: Json | None = None, **query: str) -> Json:
        return self._json("DELETE", path, body, query=query)

    def text(self, path: str, **query: str) -> str:
        """What is no JSON: a log."""
        return self._request("GET", path, None, query).decode()

    def watch(self, path: str, resource_version: str, **query: str) -> Iterator[Json]:
        """Events from a version on, until the server ends the watch (after five minutes at the latest)."""
        query |= {"watch": "1", "resourceVersion": resource_version, "timeoutSeconds": "300"}
        response = self._open("GET", path, None, query, "application/json")
        try:
            rest = b""
            for piece in response.stream(65_536):
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    yield json.loads(line)
        except HTTPError as error:
            raise ConnectionError(str(error)) from error
        finally:
            response.close()

    def _json(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        *,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
    ) -> Json:
        answer: Json = json.loads(self._request(method, path, body, query or {}, content_type))
        return answer

    def _request(
        self,
        method: str,
        path: str,
        body: Json | None,
        query: dict[str, str],
        content_type: str = "application/json",
    ) -> bytes:
        response = self._open(method, path, body, query, content_type)
        try:
            return response.read()
        except HTTPError as error:
            raise ConnectionError(str(error)) from error
        finally:
            response.release_conn()

    def _open(
        self, method: str, path: str, body: Json | None, query: dict[str, str], content_type: str
    ) -> urllib3.BaseHTTPResponse:
        url = self.url + path + ("?" + urllib.parse.urlencode(query) if query else "")
        try:
            response = self._pool.request(
                method,
                url,
                body=None if body is None else json.dumps(body).encode(),
                headers={**self._headers, "Content-Type": content_type},
                timeout=urllib3.Timeout(connect=5, read=330),
                preload_content=False,
                redirect=False,
            )
            if response.status < 400:
                return response
            content = response.read()
            response.release_conn()
        except HTTPError as error:
            raise ConnectionError(f"{method} {path}: {error}") from error
        try:
            status = json.loads(content)
            raise ApiError(response.status, status.get("reason", ""), status.get("message", ""))
        except ValueError:
            raise ApiError(response.status, "", content.decode(errors="replace")) from None


@contextlib.contextmanager
def tolerated(*statuses: int) -> Iterator[None]:
    """Lets refusals of these HTTP statuses pass."""
    try:
        yield
    except ApiError as error:
        if error.status not in statuses:
            raise


def _present(context: ssl.SSLContext, login: Json) -> None:
    """Python reads a client's certificate from files only."""
    with tempfile.NamedTemporaryFile() as certificate, tempfile.NamedTemporaryFile() as key:
        for file, name in ((certificate, "client-certificate-data"), (key, "client-key-data")):
            file.write(base64.b64decode(login[name]))
            file.flush()
        context.load_cert_chain(certificate.name, key.name)
