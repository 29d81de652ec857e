"""A study goes to another database, whole or not at all."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

from orchestrator.database import Database, SqliteDatabase, open_database
from orchestrator.storage import MOVING, open_tables
from trainers.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Generator

    import optuna
    from optuna.trial import FrozenTrial

    from orchestrator.spec import StudySpec

log = logging.getLogger(__name__)


def move_study(spec: StudySpec, url: str) -> int:
    """Copy the study to the database at `url`, compare, and put its old file aside; the number of its trials.

    Run folders stay where they are. Call with the study's lock held. A move that was cut short is finished, or begun
    anew.

    Raises:
        StorageError: There is no such study, the other database has one of that name, or a trial was not copied.
    """
    import optuna

    source, target = open_database(spec.database_url), open_database(url)
    if source.url == target.url:
        raise StorageError(f"{target}: got the database that the study is in; expected another one")
    if spec.name not in source.studies():
        raise StorageError(f"{source}: got no study {spec.name!r}; expected one that can be moved")
    with _opened(source, spec.name) as storage, _opened(target, spec.name) as other:
        old = optuna.load_study(study_name=spec.name, storage=storage)
        num_trials = _move(old, target, other)
        is_last = source.studies() == [spec.name]
        if not (is_last and isinstance(source, SqliteDatabase)):
            storage.delete_study(storage.get_study_id_from_name(spec.name))
    if is_last and isinstance(source, SqliteDatabase):
        source.path.rename(source.path.with_name(f"{source.path.name}.moved"))
    return num_trials


@contextmanager
def _opened(database: Database, name: str) -> Generator[optuna.storages.RDBStorage]:
    """Hold study `name`; the last connection to an SQLite file takes its write-ahead log with it."""
    storage = open_tables(database, name)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _move(old: optuna.Study, target: Database, storage: optuna.storages.RDBStorage) -> int:
    import optuna

    name = old.study_name
    if name in target.studies():
        found = optuna.load_study(study_name=name, storage=storage)
        if MOVING in found.user_attrs and _contents(found) == _contents(old):
            log.warning("a move that was cut short goes on after the copy")
            found.set_user_attr(MOVING, value=False)
            return len(found.get_trials(deepcopy=False))
        if not found.user_attrs.get(MOVING):
            raise StorageError(f"{target}: got a study {name!r} already; expected none; move to another database")
        log.warning("a move that was cut short is begun anew")
        optuna.delete_study(study_name=name, storage=storage)
    new = optuna.create_study(study_name=name, storage=storage, directions=old.directions)
    new.set_user_attr(MOVING, value=True)
    return _copy(old, new)


def _copy(old: optuna.Study, new: optuna.Study) -> int:
    new.add_trials(old.get_trials(deepcopy=False))
    for key, value in old.user_attrs.items():
        if key != MOVING:
            new.set_user_attr(key, value)
    before, after = _contents(old), _contents(new)
    if before != after:
        raise StorageError(f"{new.study_name}: got another study in the copy; expected the same trials and notes")
    new.set_user_attr(MOVING, value=False)
    return len(old.get_trials(deepcopy=False))


def _contents(study: optuna.Study) -> tuple[object, ...]:
    """All of a study that is to be the same elsewhere."""
    notes = {key: value for key, value in study.user_attrs.items() if key != MOVING}
    return study.directions, notes, [_content(trial) for trial in study.get_trials(deepcopy=False)]


def _content(trial: FrozenTrial) -> str:
    """All of a trial but its id, which is the database's affair; as text, in which undefined numbers are equal."""
    known = trial.params, trial.distributions, trial.user_attrs, trial.system_attrs, trial.intermediate_values
    times = trial.datetime_start, trial.datetime_complete
    return repr((trial.number, trial.state, trial.values, times, [sorted(mapping.items()) for mapping in known]))
