"""A SQLite file that is only a cache: opened by many processes, made anew when it cannot be used."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import LauncherError, UsageError

SCHEMA_VERSION = 1
"""In ``PRAGMA user_version``; a file of another version is made anew."""
APPLICATION_ID = 0x494E464C
"""In ``PRAGMA application_id`` ("INFL"): says that the file is ours to replace."""

_BUSY_TIMEOUT_S = 60.0
_DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR, sqlite3.SQLITE_FORMAT}
_CANNOT_KEEP = {
    sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
}  # fmt: skip
# The first bytes of every SQLite file, and where its header holds the application id (4 bytes, big-endian).
_MAGIC = b"SQLite format 3\0"
_APPLICATION_ID_AT = 68

T = TypeVar("T")


def default_path() -> Path:
    """``INFL_INDEX``, or ``influence-launcher/index.sqlite`` in the user's cache directory (XDG)."""
    if chosen := os.environ.get("INFL_INDEX"):
        return Path(chosen)
    cache_dir = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache_dir.is_absolute():
        cache_dir = Path.home() / ".cache"
    return cache_dir / "influence-launcher" / "index.sqlite"


class Database:
    """One process's connection.

    Where the file cannot be kept (a read-only home, a full disk), a database in memory serves this process
    instead. Only an empty file and one whose header says that it is ours are ever written or replaced.

    Args:
        path: the file; folders above it are made.
        schema: statements that make the tables.
        tell: told in words when the file had to be made anew, or cannot be kept.

    Raises:
        UsageError: what lies there is something else. From every method,
        LauncherError: SQLite fails for a reason that a new file would not cure.
    """

    def __init__(self, path: Path, schema: Sequence[str], tell: Callable[[str], None]) -> None:
        self.path = path
        self._schema = schema
        self._tell = tell
        self._connection = self._open()

    def close(self) -> None:
        self._connection.close()

    def read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        return self._recovering(lambda connection: connection.execute(query, values).fetchall())

    def write(self, apply: Callable[[sqlite3.Connection], object]) -> None:
        """Call ``apply`` in one transaction; once more where the file turned out to be damaged."""

        def transaction(connection: sqlite3.Connection) -> None:
            with _transaction(connection):
                apply(connection)

        self._recovering(transaction)

    def _recovering(self, work: Callable[[sqlite3.Connection], T]) -> T:
        try:
            try:
                return work(self._connection)
            except sqlite3.DatabaseError as error:
                if _code(error) in _CANNOT_KEEP:
                    self._go_on_in_memory(str(error))
                elif _code(error) in _DAMAGE:
                    self._connection.close()
                    self._connection = self._open(damage=str(error))
                else:
                    raise
                return work(self._connection)
        except sqlite3.Error as error:
            raise self._failure(error) from None

    def _open(self, damage: str | None = None) -> sqlite3.Connection:
        """Connect to a usable file; one process at a time, so that a new one is made once."""
        try:
            self._require_ours()  # first of all: beside somebody else's file not even a lock is left
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with _locked(self.path.with_name(self.path.name + ".lock")):
                try:
                    return self._connect_checked(thorough=damage is not None)
                except sqlite3.DatabaseError as error:
                    if _code(error) not in _DAMAGE:
                        raise
                    self._set_aside(damage or str(error))
                    return self._connect_checked()
        except sqlite3.Error as error:
            if _code(error) not in _CANNOT_KEEP:
                raise self._failure(error) from None
            return self._in_memory(str(error))
        except OSError as error:
            return self._in_memory(error.strerror or str(error))

    def _require_ours(self) -> None:
        """Refuse whatever is there and neither empty nor, by its header, an index of the launcher."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return
        if stat.S_ISREG(found.st_mode):
            with self.path.open("rb") as stream:
                header = stream.read(_APPLICATION_ID_AT + 4)
            if not header:
                return
            ours = APPLICATION_ID.to_bytes(4, "big")
            if header.startswith(_MAGIC) and header[_APPLICATION_ID_AT:] == ours:
                return
        raise UsageError(
            f"{self.path} is not an index of the launcher; it was left as it is",
            next_step="set INFL_INDEX to another path, or move away what is there",
        )

    def _connect_checked(self, thorough: bool = False) -> sqlite3.Connection:
        """Connect; make the tables in a new file, raise SQLITE_CORRUPT's like for another version's."""
        connection = sqlite3.connect(self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
        try:
            if thorough:
                ((result,),) = connection.execute("PRAGMA quick_check(1)").fetchall()
                if result != "ok":
                    raise _DamagedError(result)
            tables = connection.execute("SELECT sql FROM sqlite_schema WHERE type = 'table'").fetchall()
            ((version,),) = connection.execute("PRAGMA user_version").fetchall()
            if not tables:
                self._make_tables(connection)
            elif version != SCHEMA_VERSION:
                raise _DamagedError(f"schema version {version}, this is version {SCHEMA_VERSION}")
            elif sorted(sql for (sql,) in tables) != sorted(self._schema):
                raise _DamagedError("its tables are not those of this version")
            connection.execute("PRAGMA journal_mode = WAL")  # readers and a writer do not wait for each other
            connection.execute("PRAGMA synchronous = NORMAL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        with _transaction(connection):
            for statement in self._schema:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _set_aside(self, reason: str) -> None:
        """Move the unusable file away instead of deleting it: it might have been somebody's, misnamed."""
        self._require_ours()
        aside = self.path.with_name(self.path.name + ".damaged")
        self.path.replace(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).unlink()
        self._tell(
            f"the index {self.path} could not be used ({reason}) and is made anew; the old one: {aside}"
        )

    def _go_on_in_memory(self, reason: str) -> None:
        """With what is stored so far: the work at hand may only add to it."""
        stored, self._connection = self._connection, self._in_memory(reason)
        with suppress(sqlite3.Error), closing(stored), _transaction(self._connection):
            names = stored.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
            for (name,) in names:
                rows = stored.execute(f"SELECT * FROM {name}").fetchall()  # noqa: S608 - our own names
                if rows:
                    marks = ", ".join("?" * len(rows[0]))
                    self._connection.executemany(f"INSERT INTO {name} VALUES ({marks})", rows)  # noqa: S608

    def _in_memory(self, reason: str) -> sqlite3.Connection:
        self._tell(f"the index {self.path} cannot be kept ({reason}); set INFL_INDEX to a path that can")
        connection = sqlite3.connect(":memory:", isolation_level=None)
        self._make_tables(connection)
        return connection

    def _failure(self, error: sqlite3.Error) -> LauncherError:
        return LauncherError(
            f"the index {self.path} failed",
            why=str(error),
            next_step="choose another path with INFL_INDEX; collected results are not affected",
        )


class _DamagedError(sqlite3.DatabaseError):
    """Our own finding that a file cannot be used."""

    sqlite_errorcode = sqlite3.SQLITE_CORRUPT


def _code(error: sqlite3.Error) -> int:
    """The primary result code; 0 where Python itself raised."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")  # waits for other writers here, where nothing is read yet
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
