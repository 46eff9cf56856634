"""A pod's log joined from many connections: nothing twice, nothing lost, whatever breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.backends import pod_log
from launcher.backends.kubernetes_errors import ApiInvalid, ApiNotFound, ApiUnanswered
from launcher.backends.pod_log import PodLog


class Node:
    """A kubelet's side of a log: lines with times, a file that rotates, connections that break."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.running = True
        self.missing: Exception | None = None
        self.cuts: list[int] = []
        """After how many bytes the next connections break; none: they do not."""
        self.piece_bytes = 1000
        self.connections: list[tuple[str | None, bool]] = []

    def write(self, *texts: str, second: int = 0) -> None:
        for text in texts:
            at = f"2026-02-21T11:{second // 60:02d}:{second % 60:02d}.{len(self.lines):09d}Z"
            self.lines.append(f"{at} {text}\n".encode())

    def open(self, since: str | None, follow: bool) -> Iterator[bytes]:
        self.connections.append((since, follow))
        if self.missing is not None:
            raise self.missing
        cut = self.cuts.pop(0) if self.cuts else None
        return self._stream(since, follow, cut)

    def _stream(self, since: str | None, follow: bool, cut: int | None) -> Iterator[bytes]:
        sent = position = 0
        while True:
            lines, position = self.lines[position:], len(self.lines)
            data = b"".join(line for line in lines if since is None or line[:19] >= since.encode()[:19])
            while data:
                piece, data = data[: self.piece_bytes], data[self.piece_bytes :]
                if cut is not None and sent + len(piece) > cut:
                    yield piece[: cut - sent]
                    raise ApiUnanswered("closed in the middle")
                sent += len(piece)
                yield piece
            if not (follow and self.running):
                return
            time.sleep(0.002)


def read_all(log: PodLog, text: bytes = b"") -> bytes:
    while piece := log.read(len(text)):
        text += piece
    return text


def followed(log: PodLog, text: bytes, until: bytes) -> bytes:
    deadline = time.monotonic() + 20
    while not text.endswith(until):
        text = read_all(log, text)
        assert time.monotonic() < deadline, text
        time.sleep(0.002)
    return text


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_log, "_RECONNECT_S", 0.01)


def end(node: Node, log: PodLog) -> None:
    """So that no thread is left."""
    node.running, log.ended = False, True
    read_all(log, b"-" * log.position)


def texts(*numbers: int) -> bytes:
    return b"".join(b"line %d\n" % number for number in numbers)


@given(
    num_lines=st.integers(0, 30),
    lines_a_second=st.integers(1, 10),
    piece_bytes=st.integers(1, 200),
    cuts=st.lists(st.integers(0, 900), max_size=4),
)
def test_a_finished_log_is_read_whole_over_connections_that_break(
    num_lines: int, lines_a_second: int, piece_bytes: int, cuts: list[int]
) -> None:
    node = Node()
    for number in range(num_lines):
        node.write(f"line {number}", second=number // lines_a_second)
    node.cuts, node.piece_bytes, node.running = cuts, piece_bytes, False
    log = PodLog(node.open)
    log.ended = True
    assert read_all(log) == texts(*range(num_lines))
    num_connections = len(node.connections)
    assert log.read(log.position) == b""
    assert len(node.connections) == num_connections, "a finished log is not asked for again"


def test_a_growing_log_is_followed_over_broken_connections() -> None:
    node = Node()
    node.write("line 0", "line 1")
    log = PodLog(node.open)
    text = read_all(log)
    assert text == texts(0, 1)
    node.cuts = [0, 150, 3, 200]
    for number in range(2, 40):
        node.write(f"line {number}", second=number // 4)
        if number % 5 == 0:
            text = followed(log, text, b"line %d\n" % number)
    node.running, log.ended = False, True
    assert read_all(log, text) == texts(*range(40))


def test_what_was_printed_at_the_very_end_is_read_once_the_container_has_ended() -> None:
    node = Node()
    log = PodLog(node.open)
    assert log.read(0) == b""  # nothing yet; a thread follows from here on
    node.write("line 0")
    text = followed(log, b"", b"line 0\n")
    node.write("line 1")
    node.lines.append(b"2026-02-21T11:59:59.0Z no line end")
    node.running, log.ended = False, True
    assert read_all(log, text) == texts(0, 1) + b"no line end"


def test_a_rotated_file_loses_lines_and_says_so() -> None:
    node = Node()
    node.write("line 0", "line 1")
    log = PodLog(node.open)
    text = read_all(log)
    node.running, log.ended = False, True
    node.lines.clear()
    node.write("line 7", second=9)
    assert read_all(log, text) == texts(0, 1) + pod_log._GAP + texts(7)


def test_a_file_that_was_rotated_between_seen_lines_repeats_none() -> None:
    node = Node()
    node.write("line 0", "line 1", "line 2")
    log = PodLog(node.open)
    text = read_all(log)
    del node.lines[:2]
    node.running, log.ended = False, True
    node.lines.append(b"2026-02-21T11:00:01.000000003Z line 3\n")
    assert read_all(log, text) == texts(0, 1, 2, 3)


def test_equal_lines_at_equal_times_are_all_kept() -> None:
    node = Node()
    line = b"2026-02-21T11:00:00.000000001Z same\n"
    node.lines = [line] * 5
    node.cuts = [3 * len(line)]
    node.running = False
    log = PodLog(node.open)
    log.ended = True
    assert read_all(log) == b"same\n" * 5


def test_times_may_have_another_offset_or_be_missing() -> None:
    node = Node()
    node.lines = [b"2026-02-21T12:00:00.5+01:00 a b\n", b"failed to get the container's log\n"]
    node.running = False
    log = PodLog(node.open)
    log.ended = True
    assert read_all(log) == b"a b\nfailed to get the container's log\n"
    assert log._overlap.begin() == "2026-02-21T10:59:59Z"


@pytest.mark.parametrize("error", [ApiNotFound("gone"), ApiInvalid("ContainerCreating")])
def test_a_pod_that_is_gone_or_not_started_has_no_log_yet(error: Exception) -> None:
    node = Node()
    node.missing = error
    log = PodLog(node.open)
    assert log.read(0) == b""
    node.missing = None
    node.write("line 0")
    assert followed(log, b"", b"line 0\n") == texts(0)
    end(node, log)


def test_a_server_that_stays_away_is_told_while_the_log_is_read_and_waited_for_while_it_is_followed() -> None:
    node = Node()
    node.missing = ApiUnanswered("away")
    with pytest.raises(ApiUnanswered):
        PodLog(node.open).read(0)
    node.missing = None
    log = PodLog(node.open)
    assert log.read(0) == b""
    node.missing = ApiUnanswered("away")
    assert log.read(0) == b""
    node.missing = None
    node.write("line 0")
    assert followed(log, b"", b"line 0\n") == texts(0)
    end(node, log)


def test_reading_from_an_offset_skips_what_is_before_it() -> None:
    node = Node()
    node.write("line 0", "line 1")
    node.running = False
    log = PodLog(node.open)
    log.ended = True
    assert log.read(3) == b"e 0\nline 1\n"


def test_the_follower_stops_when_the_container_has_ended() -> None:
    of_others = set(threading.enumerate())
    node = Node()
    log = PodLog(node.open)
    log.read(0)
    log.read(0)
    (follower,) = set(threading.enumerate()) - of_others
    node.running, log.ended = False, True
    read_all(log)
    follower.join(10)
    assert not follower.is_alive()


def test_what_is_on_its_way_when_the_pod_is_deleted_is_read() -> None:
    """It cannot be opened again; the last line has no end."""
    node = Node()
    node.write("line 0")
    log = PodLog(node.open)
    text = followed(log, b"", b"line 0\n")
    read_all(log, text)  # follows from here on
    while not any(follow for _, follow in node.connections):
        time.sleep(0.002)
    node.piece_bytes = 7
    node.write(*(f"line {n}" for n in range(1, 51)))
    node.lines[-1] = node.lines[-1].removesuffix(b"\n")
    node.running, node.missing = False, ApiNotFound("gone")
    log.ended = log.gone = True
    assert read_all(log, text) == texts(*range(51)).removesuffix(b"\n")
    assert log.read(10_000) == b""
