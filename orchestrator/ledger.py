"""A study's SQLite file, read without Optuna: importing that, with SQLAlchemy, takes longer than `status` should.

Only for looking; the tables are Optuna's, and a test compares what is read here with what Optuna reads.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.tracker import TrialView
from orchestrator.views import reason_text, run_dir
from trainers.errors import StorageError
from trainers.rundir import thaw

if TYPE_CHECKING:
    from orchestrator.spec import StudySpec

_TRIALS = """
    SELECT trial_id, number, state, datetime_start, datetime_complete FROM trials
    JOIN studies USING (study_id) WHERE study_name = ? ORDER BY number
"""
_VALUES = "SELECT trial_id, value FROM trial_values WHERE objective = 0 AND value_type = 'FINITE'"
_ATTRIBUTES = "SELECT trial_id, key, value_json FROM trial_user_attributes WHERE key IN ('reason', 'message')"


def read_trials(spec: StudySpec) -> list[TrialView]:
    """Every trial of the study as it is now, by number.

    Raises:
        StorageError: There is no such study, or its file cannot be read.
    """
    path = spec.root / "study.db"
    if not path.exists():
        raise StorageError(f"{path}: got no such file; expected a study; start it with `python -m orchestrator run`")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            rows = connection.execute(_TRIALS, (spec.name,)).fetchall()
            values: dict[int, float] = dict(connection.execute(_VALUES).fetchall())
            attributes: dict[int, dict[str, Any]] = {}
            for trial_id, key, text in connection.execute(_ATTRIBUTES):
                attributes.setdefault(trial_id, {})[key] = json.loads(text)
    except sqlite3.Error as error:
        raise StorageError(f"{path}: got {error}; expected a study's SQLite file") from error
    return [_view(spec, row, values.get(row[0]), attributes.get(row[0], {})) for row in rows]


def _view(
    spec: StudySpec, row: tuple[int, int, str, str | None, str | None], value: float | None, notes: Mapping[str, Any]
) -> TrialView:
    _, number, state, start, end = row
    run = run_dir(spec.root, number)
    frozen = thaw(run.trial) if run.trial.exists() else {}
    return TrialView(
        number=number,
        state=state,
        params={path: _at(frozen, path) for path in spec.search if frozen},
        values=None if value is None else [value],
        reason=reason_text(notes.get("reason"), notes.get("message")),
        run=run,
        start=_time(start),
        end=_time(end),
    )


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _time(text: str | None) -> datetime | None:
    """Optuna stores naive UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC) if text else None
