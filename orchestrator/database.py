"""Where tables are kept, by URL: an SQLite file, or a PostgreSQL database that studies and MLflow may share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, LiteralString, cast
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import AfterValidator
from typing_extensions import override

from trainers.errors import StorageError

if TYPE_CHECKING:
    import psycopg

Query = Callable[[str, Sequence[object]], "list[tuple[Any, ...]]"]
"""Runs one SELECT; its parameters are marked by `?`."""

_BUSY_SECONDS = 60
"""How long to wait for another writer of a file; SQLite's own 5 s is short on a busy or a network disk."""
_TAKEN_SECONDS = 5.0
"""How long a server may need to notice that the process which held a study is gone."""
_POLL_SECONDS = 0.2
_CONNECT_SECONDS = 15
_KEEPALIVE_SECONDS = 30
"""A connection that says nothing for longer is asked whether it lives: firewalls forget silent ones after minutes."""
_SECRETS = frozenset({"password", "sslpassword"})
_TABLES = "tables"
"""What is locked while tables are made."""


def check_url(url: str) -> str:
    """`url`, if it can name a database.

    Raises:
        ValueError: It cannot, or it holds a password; the message does not repeat it.
    """
    parts = urlsplit(url)
    if parts.password is not None or _SECRETS & parse_qs(parts.query).keys():
        raise ValueError(
            "got a password in the address; expected it in PGPASSWORD or in ~/.pgpass, because a study file is copied "
            "into every store"
        )
    scheme = parts.scheme.partition("+")[0]
    if scheme not in _KINDS or "://" not in url or (scheme == "sqlite" and not url.startswith("sqlite:////")):
        where = url.rpartition("@")[2]  # a user's name, and what may stand beside it, are not for messages
        raise ValueError(f"got {where!r}; expected sqlite:////folder/file.db or postgresql://user@host:5432/database")
    return url


DatabaseUrl = Annotated[str, AfterValidator(check_url)]
"""`sqlite:////folder/file.db` or `postgresql://user@host:5432/database`, with libpq's parameters after a `?`."""


def sqlite_url(path: Path) -> str:
    """The URL of an SQLite file, in which `%` and `?` would mean something."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def open_database(url: str) -> Database:
    """The database that `url` names; nothing is opened yet."""
    scheme, _, rest = url.partition("://")
    return _KINDS[scheme.partition("+")[0]](rest)


@dataclass(frozen=True)
class Database(ABC):
    """A place for the tables of Optuna and MLflow."""

    address: str
    """The URL after its scheme."""
    expected: ClassVar[str]
    """What should be there, for messages."""

    @property
    @abstractmethod
    def url(self) -> str:
        """As SQLAlchemy wants it."""

    @abstractmethod
    def alone(self) -> AbstractContextManager[None]:
        """Hold the place while its tables are made, which two processes cannot do at once. Raises StorageError."""

    @abstractmethod
    def engine(self, held: str | None = None) -> dict[str, Any]:
        """Arguments for SQLAlchemy's `create_engine`.

        Args:
            held: A study that only this process may change from now on, wherever others run.
        """

    @abstractmethod
    def reading(self) -> AbstractContextManager[Query]:
        """Look at the tables without SQLAlchemy, which takes long to import. Raises StorageError."""

    @abstractmethod
    def studies(self) -> list[str]:
        """Names of the studies that are kept here; none if there is no such place yet. Raises StorageError."""


class SqliteDatabase(Database):
    """One file. Whoever changes a study in it holds the lock of the study's folder."""

    expected: ClassVar[str] = "a study's SQLite file"

    @property
    def path(self) -> Path:
        """The file."""
        return Path("/" + unquote(self.address.lstrip("/")))

    @property
    @override
    def url(self) -> str:
        return sqlite_url(self.path)

    @override
    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    @override
    def alone(self) -> Generator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_name(f"{self.path.name}.lock").open("w", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @override
    def engine(self, held: str | None = None) -> dict[str, Any]:
        if not self.path.exists():
            with closing(sqlite3.connect(self.path)) as connection:
                connection.execute("PRAGMA journal_mode=WAL")  # kept in the file; readers and the writer do not wait
        return {"connect_args": {"timeout": _BUSY_SECONDS}}

    @contextmanager
    @override
    def reading(self) -> Generator[Query]:
        try:
            with closing(self._look()) as connection:
                yield lambda query, values: connection.execute(query, tuple(values)).fetchall()
        except sqlite3.Error as error:
            raise StorageError(f"{self}: got {error}; expected {self.expected}") from error

    def _look(self) -> sqlite3.Connection:
        """To the file as it is; where nothing can be written, as on a full disk, only if its log has nothing more."""
        uri = f"{self.path.as_uri()}?mode=ro"
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS)
        try:
            connection.execute("SELECT name FROM sqlite_master LIMIT 1")
        except sqlite3.OperationalError:
            connection.close()
            log = self.path.with_name(f"{self.path.name}-wal")
            if not self.path.is_file() or (log.exists() and log.stat().st_size):
                raise
            return sqlite3.connect(f"{uri}&immutable=1", uri=True)
        return connection

    @override
    def studies(self) -> list[str]:
        if not self.path.exists():
            return []
        with self.reading() as query:
            if not query("SELECT name FROM sqlite_master WHERE name = 'studies'", ()):
                return []
            return [name for (name,) in query("SELECT study_name FROM studies", ())]


class PostgresqlDatabase(Database):
    """A database of a server. Sessions of the server hold studies, so that controllers may run on any machine."""

    expected: ClassVar[str] = "a PostgreSQL database that keeps studies"

    @property
    @override
    def url(self) -> str:
        return f"postgresql+psycopg://{self.address}"

    @override
    def __str__(self) -> str:
        parts = urlsplit(f"postgresql://{self.address}")
        return f"postgresql://{parts.netloc.rpartition('@')[2]}{parts.path}"

    @contextmanager
    @override
    def alone(self) -> Generator[None]:
        with self._connected() as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", (_key(_TABLES),))
            yield

    @override
    def engine(self, held: str | None = None) -> dict[str, Any]:
        if held is None:
            from sqlalchemy.pool import NullPool

            return {"creator": self._connect, "poolclass": NullPool}
        # One connection, which holds the study: if it breaks, the next one must first get hold of the study again.
        return {"creator": lambda: self._hold(held), "pool_size": 1, "max_overflow": 0}

    @contextmanager
    @override
    def reading(self) -> Generator[Query]:
        with self._connected() as connection:
            yield lambda query, values: connection.execute(
                cast("LiteralString", query.replace("?", "%s")), tuple(values)
            ).fetchall()

    @override
    def studies(self) -> list[str]:
        with self.reading() as query:
            if query("SELECT to_regclass('studies')", ()) == [(None,)]:
                return []
            return [name for (name,) in query("SELECT study_name FROM studies", ())]

    @contextmanager
    def _connected(self) -> Generator[psycopg.Connection[tuple[Any, ...]]]:
        psycopg = self._driver()
        try:
            with closing(self._connect()) as connection:
                yield connection
        except psycopg.Error as error:
            raise StorageError(f"{self}: got {_one_line(error)}; expected {self.expected}") from error

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        return self._driver().connect(
            f"postgresql://{self.address}",
            application_name=f"process {os.getpid()} on {socket.gethostname()}",
            connect_timeout=_CONNECT_SECONDS,
            keepalives_idle=_KEEPALIVE_SECONDS,
        )

    def _hold(self, study: str) -> psycopg.Connection[tuple[Any, ...]]:
        deadline = time.monotonic() + _TAKEN_SECONDS
        connection = self._connect()
        while connection.execute("SELECT pg_try_advisory_lock(%s)", (_key(study),)).fetchone() != (True,):
            who = connection.execute(_HOLDER, (_key(study),)).fetchone()
            connection.rollback()
            if time.monotonic() > deadline:
                connection.close()
                described = f"{who[0]} since {who[1]:%Y-%m-%d %H:%M} UTC" if who else "another process"
                raise StorageError(
                    f"{self}: got study {study!r}, which is run by {described}; expected none; wait for it, or end it "
                    "with `python -m orchestrator cancel`"
                )
            time.sleep(_POLL_SECONDS)
        connection.commit()
        return connection

    def _driver(self) -> Any:
        try:
            import psycopg
        except ImportError as error:
            raise StorageError(
                f"{self}: got no PostgreSQL driver; expected psycopg; run `pip install 'diffusion-tuning[postgres]'`"
            ) from error
        return psycopg


_KINDS: dict[str, type[Database]] = {"sqlite": SqliteDatabase, "postgresql": PostgresqlDatabase}

_HOLDER: LiteralString = """
    SELECT application_name, backend_start AT TIME ZONE 'UTC' FROM pg_stat_activity JOIN pg_locks USING (pid)
    WHERE locktype = 'advisory' AND granted AND ((classid::bigint << 32) | objid::bigint) = %s
"""


def _key(what: str) -> int:
    """A number for PostgreSQL's advisory locks: signed, 64 bits."""
    digest = hashlib.sha256(f"diffusion-tuning {what}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
