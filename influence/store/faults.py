"""What an error of the object store's client means: to be tried again, or for a person to mend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_STATUS = re.compile(r"status code: ([0-9]{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,64})</Code>")


class Kind(Enum):
    """What to do about a fault."""

    TRANSIENT = "transient"
    """Try again."""
    CONFIG = "config"
    """A person has to change something."""
    FULL = "full"
    """A person has to make room."""
    ABSENT = "absent"
    """No such object, which may be quite right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault in our own words: a server's text can quote what it was sent."""

    kind: Kind
    reason: str
    next_step: str


_CREDENTIALS = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY from the secret that cluster.secret names"
_ENDPOINT = "check AWS_ENDPOINT_URL and AWS_REGION, and that this machine reaches the endpoint"
_RIGHTS = "give these credentials s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there"
_ROOM = "make room or raise the quota, then submit again: committed steps are kept"

# S3's codes, and what compatible servers answer for the same.
_DENIED = {"AccessDenied", "AllAccessDisabled", "AccountProblem", "InvalidObjectState"}
_WRONG_KEY = {
    "InvalidAccessKeyId": "the access key is unknown there",
    "SignatureDoesNotMatch": "the secret key does not fit the access key",
    "InvalidToken": "the session token is not valid",
    "ExpiredToken": "the session token has expired",
    "AuthorizationHeaderMalformed": "the region is not the bucket's",
    "RequestTimeTooSkewed": "this machine's clock is wrong",
}
_FULL = {"QuotaExceeded", "StorageFull", "XMinioStorageFull", "InsufficientStorage", "TooManyObjects"}
# 400s that another try can cure: the body was damaged or cut short on its way.
_DAMAGED = {"BadDigest", "InvalidDigest", "IncompleteBody", "RequestTimeout", "XAmzContentSHA256Mismatch"}


def fault_of(error: BaseException) -> Fault:
    """Read the kind of a fault from the client's error, whose text ends with the server's answer."""
    text = str(error)
    status_match, code_match = _STATUS.search(text), _CODE.search(text)
    status = int(status_match[1]) if status_match else None
    code = code_match[1] if code_match else ""
    if "169.254." in text:  # where a machine of the cloud asks for its own credentials, last of all
        return Fault(kind=Kind.CONFIG, reason="there are no credentials", next_step=_CREDENTIALS)
    if code == "NoSuchBucket":
        return Fault(
            kind=Kind.CONFIG,
            reason="there is no such bucket",
            next_step="create it, or correct cluster.object_store",
        )
    if code in _WRONG_KEY:
        next_step = _CREDENTIALS if code != "AuthorizationHeaderMalformed" else _ENDPOINT
        return Fault(kind=Kind.CONFIG, reason=f"{_WRONG_KEY[code]} ({code})", next_step=next_step)
    if code in _FULL or status == 507:
        return Fault(kind=Kind.FULL, reason=f"no room is left ({code or status})", next_step=_ROOM)
    if code in _DENIED or status in (401, 403):
        return Fault(kind=Kind.CONFIG, reason=f"access is denied ({code or status})", next_step=_RIGHTS)
    if code == "NotImplemented" or status == 501:
        return Fault(
            kind=Kind.CONFIG,
            reason="the store does not know conditional puts (If-None-Match)",
            next_step="use a store that does, or cluster.storage: claim",
        )
    if "redirect without LOCATION" in text:  # the client does not pass on the server's code
        reason = "the region or the endpoint is not the bucket's"
        return Fault(kind=Kind.CONFIG, reason=reason, next_step=_ENDPOINT)
    if status == 404 or isinstance(error, FileNotFoundError):
        return Fault(kind=Kind.ABSENT, reason="it is not there", next_step="start the run again")
    if status is None and ("BadScheme" in text or "InvalidUri" in text):
        return Fault(kind=Kind.CONFIG, reason="the endpoint is no URL that can be used", next_step=_ENDPOINT)
    if status is not None and 400 <= status < 500 and status not in (408, 409, 429) and code not in _DAMAGED:
        return Fault(
            kind=Kind.CONFIG, reason=f"the request is refused ({code or status})", next_step=_ENDPOINT
        )
    reason = (
        f"it answers {status}{f' ({code})' if code else ''}"
        if status
        else f"it does not answer ({_silence(text)})"
    )
    return Fault(kind=Kind.TRANSIENT, reason=reason, next_step=_ENDPOINT)


def _silence(text: str) -> str:
    if "kind: Timeout" in text or "TimedOut" in text:
        return "time-out"
    if "dns error" in text:
        return "its name is unknown"
    if "ConnectionRefused" in text:
        return "connection refused"
    return "no connection" if "kind: Connect" in text else "the connection broke"
