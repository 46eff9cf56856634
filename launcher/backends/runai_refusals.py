"""What Run:ai refuses, as errors with a reason and a next step.

The shape of its refusals was not seen on a live control plane: ``{"code", "message", "details"}`` is assumed,
and anything else is passed over.
"""

from __future__ import annotations

import email.utils
import json
import re
import time
from typing import Any

from launcher.backends.runai_network import Answer, Failure
from launcher.errors import BackendError

TOKEN_PATH = "/api/v1/token"  # noqa: S105 - a path
_MAX_TOLD = 300  # characters of a server's own words in a message


class NotThereError(BackendError):
    """404: no such object."""


class NameTakenError(BackendError):
    """409: something has the name."""


class OutcomeUnknownError(BackendError):
    """An order may have been carried out or not; look before giving it again."""


class TokenRefusedError(OutcomeUnknownError):
    """A 401 to an order: it should not have been carried out, but what stands before the API may err."""


NOT_JSON = object()


def parse_json(content: bytes) -> Any:
    """JSON as data, `NOT_JSON` where it is none: an exception would hold the content."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return NOT_JSON


def refusal(
    place: str,
    order: str,
    outcome: Answer | Failure,
    *,
    once: bool,
    num_tries: int,
    project: str,
    variables: str,
) -> BackendError:
    """The error for what came instead of a good answer.

    Args:
        order: method and path.
        once: whether it was an order, of unknown outcome then if it may have arrived.
        variables: the names of the variables with the credentials.
    """
    tries = f", tried {num_tries} times" if num_tries > 1 else ""
    if isinstance(outcome, Failure):
        kind = OutcomeUnknownError if once and outcome.arrived else BackendError
        return kind(f"{place}: {order} failed{tries}", why=outcome.reason, next_step=outcome.next_step)
    status, why = outcome.status, _told(outcome.content)
    if order.endswith(TOKEN_PATH) and 400 <= status < 500 and status not in (404, 429):
        return BackendError(
            f"{place} does not accept the credentials in {variables} ({status})",
            why=why,
            next_step="set both to the ID and secret of a service account or access key of this tenant",
        )
    if status == 401:
        return BackendError(
            f"{place} refuses the token that it has just given, for {order} (401)",
            why=why,
            next_step=f"check that {variables} belong to this tenant",
        )
    if status == 403:
        return BackendError(
            f"{place} does not permit {order} (403)",
            why=why,
            next_step=f"have an administrator give the account behind {variables} {_role(order)} "
            f"in project '{project}'",
        )
    if status == 429:
        return BackendError(
            f"{place} asks to slow down, for {order} (429{tries})",
            why=why,
            next_step=f"repeat the command in {retry_after_s(outcome.retry_after) or 60:.0f} s",
        )
    if status >= 500:
        kind = OutcomeUnknownError if once else BackendError
        return kind(
            f"{place}: {order} failed ({status}{tries})",
            why=why,
            next_step="try again later; if it stays so, tell its administrator",
        )
    if 300 <= status < 400:
        return BackendError(
            f"{place} sends {order} to another address ({status})",
            why="credentials are not sent on",
            next_step="set the profile's runai.url to the address of the control plane itself",
        )
    if status == 404:
        return NotThereError(
            f"{place}: nothing is there for {order} (404)",
            why=why,
            next_step="check the profile's runai.url: the address of the control plane, without a path",
        )
    kind = NameTakenError if status == 409 else BackendError
    return kind(
        f"{place} does not accept {order} ({status})",
        why=why,
        next_step="`launcher doctor` checks the profile; `launcher render` shows what is sent",
    )


def not_json(place: str, order: str, content: bytes, *, once: bool) -> BackendError:
    """The error for a good status with something else than JSON."""
    kind = OutcomeUnknownError if once else BackendError
    return kind(
        f"{place}: the answer to {order} is not JSON",
        why=f"it starts with {content[:40].decode('utf-8', 'replace')!a}: a log-in page or a proxy "
        "may have answered",
        next_step="check the profile's runai.url: the address of the control plane, without a path",
    )


def misshapen(place: str, path: str, what: str) -> BackendError:
    """The error for JSON that is not what the API describes."""
    return BackendError(
        f"{place}: the answer to {path} has an unexpected shape: {what}",
        why="another version of the API, or something that answers in its place",
        next_step="check the profile's runai.url, and the control plane's version (2.18 or later)",
    )


def retry_after_s(header: str | None) -> float | None:
    """The header's seconds, or the seconds until its date; None where it is neither."""
    if header is None:
        return None
    if re.fullmatch(r"[0-9]{1,9}", header.strip()):
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def one_line(text: str) -> str:
    """A server's words without line breaks and control characters, cut to a readable length."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line[:_MAX_TOLD] + "..." if len(line) > _MAX_TOLD else line


def _told(content: bytes) -> str | None:
    document = parse_json(content)
    if not isinstance(document, dict):
        return None
    words = [document.get(key) for key in ("message", "details", "error")]
    return one_line("; ".join(word for word in words if isinstance(word, str))) or None


def _role(order: str) -> str:
    if "/workloads" not in order:
        return "a role that may view projects, clusters and node pools"
    if order.startswith("GET"):
        return "a role that may view workloads"
    return "a role that may create and delete trainings, such as 'L1 researcher',"
