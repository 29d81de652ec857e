"""A study's database, read without Optuna: importing that, with SQLAlchemy, takes longer than `status` should.

Only for looking; the tables are Optuna's, and a test compares what is read here with what Optuna reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from orchestrator.database import open_database
from orchestrator.tracker import TrialView
from orchestrator.views import broken_text, reason_text, run_dir, violations
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
    WHERE study_name = ? AND value_type = 'FINITE' ORDER BY trial_id, objective
"""
_CONSTRAINTS = """
    SELECT trial_id, substr(key, 13), value_json FROM trial_system_attributes
    JOIN trials USING (trial_id) JOIN studies USING (study_id)
    WHERE study_name = ? AND substr(key, 1, 12) = 'constraints:' ORDER BY trial_system_attribute_id
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
        known = {row[0]: _Known() for row in rows}
        for trial_id, value in query(_VALUES, (spec.name,)):
            known[trial_id].values.append(value)
        for trial_id, key, text in query(_ATTRIBUTES, (spec.name,)):
            known[trial_id].attributes[key] = json.loads(text)
        for trial_id, key, text in query(_CONSTRAINTS, (spec.name,)):
            known[trial_id].constraints[key] = json.loads(text)
    return [_view(spec, row, known[row[0]]) for row in rows]


@dataclass
class _Known:
    """What stands in other tables about a trial."""

    values: list[float] = field(default_factory=list[float])
    attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    constraints: dict[str, float] = field(default_factory=dict[str, float])


def _view(spec: StudySpec, row: tuple[Any, ...], known: _Known) -> TrialView:
    _, number, state, start, end = row
    run = run_dir(spec.root, number)
    frozen = thaw(run.trial) if run.trial.exists() else {}
    broken = violations(state, known.constraints)
    return TrialView(
        number=number,
        state=state,
        params={path: _at(frozen, path) for path in spec.search if frozen},
        values=known.values or None,
        reason=reason_text(known.attributes.get("reason"), known.attributes.get("message")) or broken_text(broken),
        run=run,
        start=_time(start),
        end=_time(end),
        violations=broken,
    )


def _at(tree: Any, path: str) -> Any:
    for part in path.split("."):
        tree = tree[part]
    return tree


def _time(stored: str | datetime | None) -> datetime | None:
    """Optuna stores naive UTC, which SQLite gives back as text."""
    moment = datetime.fromisoformat(stored) if isinstance(stored, str) else stored
    return moment and moment.replace(tzinfo=UTC)
