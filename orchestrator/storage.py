"""A study in its database: one controller at a time, and never two different studies under one name."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import socket
import sqlite3
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO, cast

from orchestrator.database import Database, open_database
from orchestrator.identity import check_identity
from orchestrator.provenance import versions
from trainers.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path

    import optuna

    from orchestrator.spec import StudySpec

log = logging.getLogger(__name__)

_LOCK_POLL_SECONDS = 0.2
MOVING = "moving"
"""Attribute of a study that is still being copied from another database."""
_VERSIONS = "versions"


@contextmanager
def controller_lock(root: Path) -> Generator[None]:
    """Hold a study for the one process that may change it.

    Raises:
        StorageError: Another process holds it, or `root` cannot be written.
    """
    path = root / "lock"
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{root}: got {_reason(error)}; expected a folder that can be written") from error
    with file:
        if not _try_lock(file):
            raise StorageError(
                f"{path}: got a study that is run by {_describe(holder(root))}; expected none; wait for it, or end it "
                "with `python -m orchestrator cancel`"
            )
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}) + "\n")
        file.flush()
        yield


@contextmanager
def told(root: Path) -> Generator[None]:
    """Make an error of the user's of a full or read-only disk, and of a server that is gone. Raises StorageError."""
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except BrokenPipeError:  # the reader of our output has seen enough
        raise
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error, OSError) as error:
        problem = str(error.__cause__ or error).partition("\n")[0]
        raise StorageError(f"{root}: got {problem}; expected to read and write the study") from error


def holder(root: Path) -> dict[str, Any] | None:
    """Process id, host and start of whoever last took the lock, or None if nobody has, or just now."""
    try:
        return cast("dict[str, Any]", json.loads((root / "lock").read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return None


def end_controller(root: Path, timeout_seconds: float) -> bool:
    """Ask the study's controller to end its jobs and itself, and wait for that; False if there is none.

    Raises:
        StorageError: It runs on another machine, or does not end in time.
    """
    path = root / "lock"
    deadline = time.monotonic() + timeout_seconds
    with path.open("a+", encoding="utf-8") as file:
        if _try_lock(file):
            return False
        who = holder(root)
        if who is None or who["host"] != socket.gethostname():
            raise StorageError(f"{path}: got a study that is run by {_describe(who)}; expected one on this machine")
        os.kill(who["pid"], signal.SIGTERM)
        while not _try_lock(file):
            if time.monotonic() > deadline:
                raise StorageError(f"{path}: got {_describe(who)} that goes on; expected it to end on SIGTERM")
            time.sleep(_LOCK_POLL_SECONDS)
    return True


def _try_lock(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _describe(who: dict[str, Any] | None) -> str:
    return f"process {who['pid']} on {who['host']} since {who['since']}" if who else "another process"


def open_study(spec: StudySpec) -> optuna.Study:
    """Create the study or go on with it. Call with the lock held; in a shared database it is held there too.

    Raises:
        StorageError: The database is damaged, of another version, or holds another study; the message says what
            differs.
    """
    database = open_database(spec.database_url)
    is_new = spec.name not in _studies(spec, database)
    if is_new and (spec.root / "trials").exists():
        raise StorageError(
            f"{spec.root}/trials: got trials of study {spec.name!r}, which {database} does not hold; expected the "
            "database that it was started with, or no such folder; correct `storage`, or move the folder away"
        )
    storage = open_tables(database, spec.name)
    try:
        study = _study(spec, storage, is_held=True)
        _check_folder(spec, study, database)
        check_identity(spec, study, database)
    except StorageError:
        storage.remove_session()
        storage.engine.dispose()  # which lets go of the study
        raise
    _note_versions(study)
    return study


def read_study(spec: StudySpec, *, is_held: bool = False) -> optuna.Study:
    """The study as it is now, to look at, or to end what it runs if `is_held`.

    Raises:
        StorageError: There is none, it cannot be read, or another process holds it.
    """
    database = open_database(spec.database_url)
    if spec.name not in _studies(spec, database):
        raise StorageError(
            f"{database}: got no study {spec.name!r}; expected one; start it with `python -m orchestrator run`"
        )
    return _study(spec, open_tables(database, spec.name if is_held else None), is_held=is_held)


def open_tables(database: Database, held: str | None = None) -> optuna.storages.RDBStorage:
    """Optuna's storage in `database`, with its tables made and of the version that this Optuna knows.

    Args:
        database: Where.
        held: A study that only this process may change from now on.

    Raises:
        StorageError: It cannot be opened, is something else, or has another version.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with database.alone():
            storage = optuna.storages.RDBStorage(database.url, engine_kwargs=database.engine())
        if held is None:
            return storage
        storage.engine.dispose()
        return optuna.storages.RDBStorage(
            database.url, database.engine(held), skip_compatibility_check=True, skip_table_creation=True
        )
    except RuntimeError as error:
        problem = str(error).replace("$STORAGE_URL", repr(database.url))
        raise StorageError(f"{database}: got tables of another version; {problem}") from error
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        problem = " ".join(str(error.__cause__ or error).partition("(Background")[0].split())
        raise StorageError(f"{database}: got {problem}; expected {database.expected}") from error


def _studies(spec: StudySpec, database: Database) -> list[str]:
    names = database.studies()
    if spec.storage is None and names not in ([], [spec.name]):
        raise StorageError(f"{database}: got study {names[0]!r}; expected {spec.name!r}; move the folder away")
    return names


def _study(spec: StudySpec, storage: optuna.storages.RDBStorage, *, is_held: bool) -> optuna.Study:
    import optuna

    from orchestrator.held import HeldStorage

    return optuna.create_study(
        storage=HeldStorage(storage) if is_held else storage,
        study_name=spec.name,
        directions=[optuna.study.StudyDirection.MAXIMIZE] * len(spec.objective.names),
        sampler=optuna.samplers.RandomSampler(),  # the controller sets the study's own
        pruner=optuna.pruners.NopPruner(),  # ours judges what jobs report: orchestrator/pruners.py
        load_if_exists=True,
    )


def _check_folder(spec: StudySpec, study: optuna.Study, database: Database) -> None:
    """A shared database may hold a study of that name whose trials lie in another folder."""
    if study.user_attrs.get(MOVING):
        raise StorageError(
            f"{database}: got study {spec.name!r}, whose move was interrupted; expected all of it; run "
            "`python -m orchestrator move` again"
        )
    started = [trial.number for trial in study.get_trials(deepcopy=False) if "sha256" in trial.user_attrs]
    if started and not (spec.root / "trials").exists():
        raise StorageError(
            f"{database}: got study {spec.name!r} with {len(started)} started trials, none of which is in "
            f"{spec.root}/trials; expected their folders; correct `output`, or give the study a new `name`"
        )


def _note_versions(study: optuna.Study) -> None:
    """Remember every set of versions that the study ran under; warn about a new one."""
    known, now = study.user_attrs.get(_VERSIONS, []), versions()
    if known and known[-1] != now:
        changes = [f"{key} {known[-1].get(key)} -> {now[key]}" for key in now if now[key] != known[-1].get(key)]
        log.warning("the study goes on under other versions than before: %s", ", ".join(changes))
    if not known or known[-1] != now:
        study.set_user_attr(_VERSIONS, [*known, now])


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
