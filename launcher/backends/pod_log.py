"""A container's log as a stream of bytes that can be asked for piece by piece, without loss or repetition.

The API serves a log from a time on, in whole seconds, and knows no offsets. So every line is read with the
time that the node gave it; after a connection broke, the lines of the last seconds are asked for again, and
those that were seen are left out.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

from launcher.backends.kubernetes_errors import ApiError, ApiInvalid, ApiNotFound, ApiUnanswered

OpenStream = Callable[[str | None, bool], Iterator[bytes]]
"""Opens the log, with times in front of its lines, from a time on; True: go on while it grows."""

_GAP = b"[launcher: the node rotated this log; lines may be missing here]\n"
_MARGIN = timedelta(seconds=1)  # two streams of a container may be stamped slightly out of order
_MAX_BROKEN = 5
_RECONNECT_S = 1.0
_LAST_LINES_S = 5.0  # for what is on its way when the container has ended
_MAX_BUFFERED_BYTES = 2**23


class PodLog:
    """One container's log.

    It is read to its present end first; then a thread follows it, so that no line is missed in a file that
    the node rotates away meanwhile.

    Args:
        open_stream: see ``OpenStream``; raises ApiError.
    """

    def __init__(self, open_stream: OpenStream) -> None:
        self._open = open_stream
        self._overlap = _Overlap()
        self._present: Iterator[bytes] | None = None
        self._follower: _Follower | None = None
        self._left = b""
        self._finished = False
        self.position = 0
        """Bytes handed out so far."""
        self.ended = False
        """Set it when the container has ended: the log is then read to its very end."""
        self.gone = False
        """Set it too when the pod is no longer there: only what is on its way can be read then."""

    def read(self, offset_bytes: int) -> bytes:
        """The next piece from an offset on, at least ``position``; empty where there is no more by now.

        Raises:
            ApiError: it cannot be read; while it is followed, a server that is away is waited for instead.
        """
        while piece := self._left or self._next():
            self._left = b""
            begins, self.position = self.position, self.position + len(piece)
            if self.position > offset_bytes:
                return piece[max(0, offset_bytes - begins) :]
        return b""

    def _next(self) -> bytes:
        if self._follower is not None:
            if not self.ended:
                return self._follower.take()
            piece, self._follower = self._follower.take_the_last(), None
            if self.gone:  # it cannot be opened again
                piece += self._overlap.rest()
                self._finished = True
            if piece:
                return piece
        if self._finished:
            return b""
        if self._present is None:
            self._present = self._to_the_end()
        piece = next(self._present, b"")
        if not piece:
            self._present = None
            self._finished = self.ended
            if not self.ended:
                self._follower = _Follower(self._open, self._overlap)
        return piece

    def _to_the_end(self) -> Iterator[bytes]:
        """Pieces up to the present end, over as many connections as it takes; none of them empty."""
        broken = 0
        while True:
            try:
                for piece in self._open(self._overlap.begin(), False):
                    broken = 0
                    if new := self._overlap.feed(piece):
                        yield new
            except (ApiNotFound, ApiInvalid):  # gone, or not started: no more by now
                return
            except ApiUnanswered:
                broken += 1
                if broken == _MAX_BROKEN:
                    raise
            else:
                if self.ended and (rest := self._overlap.rest()):
                    yield rest
                return


class _Follower:
    """Reads a growing log in a thread, into a buffer."""

    def __init__(self, open_stream: OpenStream, overlap: _Overlap) -> None:
        self._open = open_stream
        self._overlap = overlap
        self._buffer = bytearray()
        self._lock = threading.Lock()
        self._last = threading.Event()  # no connection is to follow the present one
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pod-log", daemon=True)
        self._thread.start()

    def take(self) -> bytes:
        """What has come."""
        with self._lock:
            piece = bytes(self._buffer)
            self._buffer.clear()
        return piece

    def take_the_last(self) -> bytes:
        """What has come and what the open connection still brings; the overlap is touched no more then."""
        self._last.set()
        self._thread.join(_LAST_LINES_S)
        with self._lock:
            self._stopped.set()
        return self.take()

    def _run(self) -> None:
        while not self._last.is_set():
            # A server that is away comes back; of a pod that is gone for good, others tell (`ended`).
            with suppress(ApiError):
                self._read_one_connection()
            self._last.wait(_RECONNECT_S)

    def _read_one_connection(self) -> None:
        with self._lock:
            if self._stopped.is_set():
                return
            since = self._overlap.begin()
        for piece in self._open(since, True):
            with self._lock:
                if self._stopped.is_set():
                    return
                self._buffer += self._overlap.feed(piece)
            while len(self._buffer) > _MAX_BUFFERED_BYTES and not self._last.is_set():
                self._last.wait(_RECONNECT_S / 10)


class _Overlap:
    """Joins what several connections deliver of one log."""

    def __init__(self) -> None:
        self._recent: deque[tuple[datetime, bytes]] = deque()  # lines handed out that a next one repeats
        self._expected: list[bytes] = []
        self._num_repeated = 0
        self._half = b""

    def begin(self) -> str | None:
        """A connection starts; returns from which time on it has to deliver, None: from the beginning."""
        self._half, self._num_repeated = b"", 0
        since = None if not self._recent else _whole_second(self._recent[-1][0] - _MARGIN)
        self._expected = [] if since is None else [line for at, line in self._recent if at >= since]
        return None if since is None else since.strftime("%Y-%m-%dT%H:%M:%SZ")

    def feed(self, piece: bytes) -> bytes:
        """What is new in the next piece of the connection, without the times; whole lines only."""
        *lines, self._half = (self._half + piece).split(b"\n")
        return b"".join(map(self._new, lines))

    def rest(self) -> bytes:
        """The last line, where the container ended without a line end."""
        half, self._half = self._half, b""
        return self._new(half).removesuffix(b"\n") if half else b""

    def _new(self, line: bytes) -> bytes:
        gap = b""
        if self._num_repeated < len(self._expected):
            try:  # normally the very next one; further on where the node rotated some of them away
                self._num_repeated = 1 + self._expected.index(line, self._num_repeated)
            except ValueError:
                gap = _GAP if not self._num_repeated else b""
                self._expected = []
            else:
                return b""
        stamp, _, text = line.partition(b" ")
        at = _time(stamp)
        if at is None:  # a word of the node's own, not a line of the container
            return gap + line + b"\n"
        self._recent.append((at, line))
        oldest = _whole_second(at - _MARGIN)
        while self._recent[0][0] < oldest:
            self._recent.popleft()
        return gap + text + b"\n"


def _time(stamp: bytes) -> datetime | None:
    try:
        at = datetime.fromisoformat(stamp.decode("ascii"))
    except ValueError:
        return None
    return at.astimezone(UTC) if at.tzinfo is not None else None


def _whole_second(at: datetime) -> datetime:
    return at.replace(microsecond=0)
