"""A study's database, read without Optuna: importing that, with SQLAlchemy, takes longer than `status` should.

Only for looking; the tables are Optuna's, and a test compares what is read here with what Optuna reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.database import open_database
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
_VALUES = """
    SELECT trial_id, value FROM trial_values JOIN trials USING (trial_id) JOIN studies USING (study_id)
    WHERE study_name = ? AND objective = 0 AND value_type = 'FINITE'
"""
_ATTRIBUTES = """
    SELECT trial_id, key, value_json FROM trial_user_attributes
    JOIN trials USING (trial_id) JOIN studies USING (study_id) WHERE study_name = ? AND key IN ('reason', 'message')
"""


def has_study(spec: StudySpec) -> bool:
    """Whether the study was ever run. Raises StorageError."""
    return spec.name in open_database(spec.database_url).studies()


def read_trials(spec: StudySpec) -> list[TrialView]:
    """Every trial of the study as it is now, by number.

    Raises:
        StorageError: There is no such study, or its database cannot be read.
    """
    database = open_database(spec.database_url)
    if not has_study(spec):
        raise StorageError(
            f"{database}: got no study {spec.name!r}; expected one; start it with `python -m orchestrator run`"
        )
    with database.reading() as query:
        rows = query(_TRIALS, (spec.name,))
        values: dict[int, float] = dict(query(_VALUES, (spec.name,)))
        attributes: dict[int, dict[str, Any]] = {}
        for trial_id, key, text in query(_ATTRIBUTES, (spec.name,)):
            attributes.setdefault(trial_id, {})[key] = json.loads(text)
    return [_view(spec, row, values.get(row[0]), attributes.get(row[0], {})) for row in rows]


def _view(spec: StudySpec, row: tuple[Any, ...], value: float | None, notes: Mapping[str, Any]) -> TrialView:
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


def _time(stored: str | datetime | None) -> datetime | None:
    """Optuna stores naive UTC, which SQLite gives back as text."""
    moment = datetime.fromisoformat(stored) if isinstance(stored, str) else stored
    return moment and moment.replace(tzinfo=UTC)
