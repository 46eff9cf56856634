"""Run:ai's client ID, secret and tokens: where they come from, how long they last, how they stay hidden."""

from __future__ import annotations

import json
import urllib.parse
from base64 import urlsafe_b64decode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from launcher.errors import BackendError

if TYPE_CHECKING:
    from launcher.profiles import RunaiAccess


class Credentials:
    """What signs a client in; prints as nothing but the variables' names.

    Raises:
        BackendError: a variable is not set; names it.
    """

    __slots__ = ("_client_id", "_client_secret", "_hidden", "variables")

    def __init__(self, access: RunaiAccess, environment: Mapping[str, str]) -> None:
        self.variables = f"{access.client_id_variable} and {access.client_secret_variable}"
        self._client_id = _value_of(access.client_id_variable, environment)
        self._client_secret = _value_of(access.client_secret_variable, environment)
        self._hidden = _spellings(self._client_secret)

    def __repr__(self) -> str:
        return f"Credentials({self.variables})"

    def token_request(self) -> dict[str, str]:
        """The body of ``POST /api/v1/token``. Older control planes know ``app_token`` only and refuse it."""
        return {
            "grantType": "client_credentials",
            "clientId": self._client_id,
            "clientSecret": self._client_secret,
        }

    def hide(self, token: str) -> None:
        """Keep a token out of what is read from now on, beside the secret and the tokens before it."""
        self._hidden = (*_spellings(token), *self._hidden)[:_MAX_HIDDEN]

    def without_secrets(self, content: bytes) -> bytes:
        """An answer with ``***`` for secret and tokens, since a server may repeat what it was sent."""
        for spelling in (*self._hidden, *_spellings(self._client_secret)):
            content = content.replace(spelling, b"***")
        return content


_MAX_HIDDEN = 40  # tokens are replaced every few minutes; answers repeat the last ones at most
_MIN_SECRET = 6  # characters; what is shorter is no secret, and occurs in any text


def _value_of(variable: str, environment: Mapping[str, str]) -> str:
    value = environment.get(variable, "").strip()
    if not value:
        raise BackendError(
            f"{variable} is not set",
            why="Run:ai asks for the client ID and secret of a service account or access key",
            next_step=f"export {variable}=..., from Run:ai's settings: Access keys, or Service accounts",
        )
    return value


def _spellings(secret: str) -> tuple[bytes, ...]:
    if len(secret) < _MIN_SECRET:
        return ()
    forms = {
        secret,
        json.dumps(secret)[1:-1],
        urllib.parse.quote(secret, safe="", errors="replace"),
        urllib.parse.quote_plus(secret, errors="replace"),
    }
    return tuple(form.encode("utf-8", "surrogateescape") for form in sorted(forms, key=len, reverse=True))


def lifetime_s(token: str, answer: Mapping[str, Any]) -> float | None:
    """Seconds for which a token is good: its own ``exp`` less ``iat`` where it is a JWT, or ``expiresIn``.

    A difference, so that this machine's clock does not matter. None: neither says.
    """
    claims: Any = None
    try:
        payload = token.split(".")[1]
        claims = json.loads(urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (IndexError, ValueError, RecursionError):
        pass
    if isinstance(claims, dict):
        issued_s, ends_s = _number(claims.get("iat")), _number(claims.get("exp"))
        if issued_s is not None and ends_s is not None and ends_s > issued_s:
            return ends_s - issued_s
    said_s = _number(answer.get("expiresIn"))
    return said_s if said_s is not None and said_s > 0 else None


def _number(value: Any) -> float | None:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12
    return float(value) if plain else None
