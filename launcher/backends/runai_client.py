"""Run:ai's REST API, as much of it as the launcher needs: one place for tokens, tries and pages.

Questions (GET) and the request for a token are repeated. Orders (POST, DELETE) are sent once, since one whose
answer got lost may have been carried out: `OutcomeUnknownError` then tells the caller to look. An order that
was refused with 401 is sent a second time, with a new token, where twice is no harm.

The client secret and the tokens leave in requests only: answers are freed of both before anybody reads them.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launcher.backends.runai_credentials import Credentials, lifetime_s
from launcher.backends.runai_network import Answer, Connection, Failure, Limits
from launcher.backends.runai_refusals import (
    NOT_JSON,
    TOKEN_PATH,
    TokenRefusedError,
    misshapen,
    not_json,
    parse_json,
    refusal,
    retry_after_s,
)

if TYPE_CHECKING:
    from launcher.errors import BackendError
    from launcher.profiles import RunaiAccess

_TOKEN = re.compile(r"[!-~]+")  # whatever else would not fit into a header
_TOKEN_MARGIN_S = 60.0


class RunaiClient:
    """Speaks to one control plane; no connection is opened before the first question.

    Args:
        environment: where the variables with the credentials are looked up; by default this process's.
        sleep: how to wait between tries.

    Raises:
        BackendError: the profile's address cannot be used, or a variable with the credentials is not set.
    """

    def __init__(
        self,
        access: RunaiAccess,
        environment: Mapping[str, str] | None = None,
        *,
        limits: Limits | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.limits = limits or Limits()
        self.project = access.project
        self._connection = Connection(access.url, access.ca_file, self.limits)
        self._credentials = Credentials(access, os.environ if environment is None else environment)
        self._sleep = sleep
        self._token: str | None = None
        self._renew_at_s = float("inf")

    def __repr__(self) -> str:
        return f"RunaiClient({self._connection.base!r})"

    @property
    def place(self) -> str:
        """Where this is, for messages: ``Run:ai at https://lab.run.ai``."""
        return f"Run:ai at {self._connection.base}"

    def close(self) -> None:
        """Close the connection; a later call opens another."""
        self._connection.close()

    def sign_in(self) -> None:
        """Get a token; raises BackendError that names the credentials' variables where there is none."""
        self._valid_token()

    def get(self, path: str, **query: str | int | bool) -> Any:
        """Ask, again where that helps.

        Raises:
            NotThereError: 404.
            BackendError: no usable answer came, with the reason and a next step.
        """
        return self._call("GET", path, query=query)

    def post(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Give an order, once; None where the answer is empty.

        Raises:
            NameTakenError, NotThereError: 409, 404.
            OutcomeUnknownError: it may have been carried out.
            BackendError: it was refused, or did not arrive.
        """
        return self._call("POST", path, body=body, once=True)

    def create(self, path: str, body: Mapping[str, Any]) -> Any:
        """Give an order that must not be carried out twice; raises as `post`, TokenRefusedError at a 401."""
        return self._call("POST", path, body=body, once=True, repeatable=False)

    def delete(self, path: str) -> Any:
        """Order a deletion, once; raises as `post`."""
        return self._call("DELETE", path, once=True)

    def pages(self, path: str, key: str, *, max_items: int | None = None, **query: str) -> Iterator[Any]:
        """The items of a list, page after page; ``key`` names them in the answer.

        Args:
            max_items: be content with so many.

        Raises:
            BackendError: as `get`; or the list does not come to an end.
        """
        offset = num_items = 0
        previous: list[Any] | None = None
        for _ in range(self.limits.num_pages):
            answer = self.get(path, limit=self.limits.page_items, offset=offset, **query)
            items = answer.get(key) if isinstance(answer, dict) else None
            if not isinstance(items, list):
                raise self.misshapen(path, f"no list '{key}'")
            if not items:
                return
            if items == previous:
                raise self.misshapen(path, f"the same page of '{key}' again")
            previous = items
            for item in items:
                yield item
                num_items += 1
                if num_items == max_items:
                    return
            offset += len(items)
            following = answer.get("next")
            if following is None:
                if len(items) < self.limits.page_items:
                    return
            elif not isinstance(following, int) or following < offset:
                return  # the last page has none, or one that leads nowhere new
        raise self.misshapen(path, f"more than {self.limits.num_pages} pages of '{key}'")

    def misshapen(self, path: str, what: str) -> BackendError:
        """The error for JSON that is not what the API describes."""
        return misshapen(self.place, path, what)

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        once: bool = False,
        repeatable: bool = True,
    ) -> Any:
        def send() -> Answer | Failure:
            return self._connection.send(method, path, query=query, body=body, token=self._valid_token())

        order = f"{method} {path}"
        content = self._credentials.without_secrets(
            self._tried(order, send, once=once, repeatable=repeatable).content
        )
        document = parse_json(content)
        if document is NOT_JSON and content.strip():
            raise not_json(self.place, order, content, once=once)
        return None if document is NOT_JSON else document

    def _tried(
        self, order: str, send: Callable[[], Answer | Failure], *, once: bool = False, repeatable: bool = True
    ) -> Answer:
        """Send until a good answer comes, or no further try helps."""
        started_s = time.monotonic()
        num_tries, token_refused = 0, False
        while True:
            outcome = send()
            if isinstance(outcome, Answer):
                if 200 <= outcome.status < 300:
                    return outcome
                if outcome.status == 401 and self._token is not None and not token_refused:
                    token_refused, self._token = True, None
                    if not repeatable:
                        raise TokenRefusedError(
                            f"{self.place} no longer takes the token, for {order} (401)",
                            next_step="repeat the command",
                        )
                    continue
            num_tries += 1
            left_s = self.limits.patience_s - (time.monotonic() - started_s)
            wait_s = None if once else self._wait_s(outcome, num_tries)
            if wait_s is None or wait_s >= left_s:
                if isinstance(outcome, Answer):
                    content = self._credentials.without_secrets(outcome.content)
                    outcome = Answer(outcome.status, outcome.retry_after, content)
                raise refusal(
                    self.place, order, outcome, once=once, num_tries=num_tries,
                    project=self.project, variables=self._credentials.variables,
                )  # fmt: skip
            self._sleep(wait_s)

    def _wait_s(self, outcome: Answer | Failure, num_tries: int) -> float | None:
        """Seconds until the next try, with full jitter; None where none helps."""
        if isinstance(outcome, Failure):
            helps = outcome.passing
        else:
            helps = outcome.status == 429 or outcome.status >= 500
        if not helps or num_tries >= self.limits.num_tries:
            return None
        most_s = min(self.limits.max_backoff_s, self.limits.backoff_s * 2 ** (num_tries - 1))
        asked_s = retry_after_s(outcome.retry_after) if isinstance(outcome, Answer) else None
        return (asked_s or 0.0) + random.uniform(0, most_s)

    def _valid_token(self) -> str:
        if self._token is not None and time.monotonic() < self._renew_at_s:
            return self._token
        self._token = None
        answer = self._tried(
            f"POST {TOKEN_PATH}",
            lambda: self._connection.send("POST", TOKEN_PATH, body=self._credentials.token_request()),
        )
        document = parse_json(answer.content)
        token = document.get("accessToken") if isinstance(document, dict) else None
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise self.misshapen(TOKEN_PATH, "no accessToken")
        self._credentials.hide(token)
        good_for_s = lifetime_s(token, document)
        if good_for_s is None:
            self._renew_at_s = float("inf")  # until it is refused
        else:
            self._renew_at_s = time.monotonic() + good_for_s - min(_TOKEN_MARGIN_S, good_for_s / 2)
        self._token = token
        return token
