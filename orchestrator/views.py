"""A study as people, trackers and displays see it, read from its storage and its run directories."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import yaml

from orchestrator.tracker import StudyView, TrialView
from trainers.rundir import RunDir

if TYPE_CHECKING:
    from pathlib import Path

    import optuna
    from optuna.trial import FrozenTrial

    from orchestrator.spec import StudySpec


def run_dir(root: Path, number: int) -> RunDir:
    """Where trial `number` of the study in `root` lives."""
    return RunDir(root / "trials" / f"{number:04d}")


def study_view(spec: StudySpec, study: optuna.Study) -> StudyView:
    """What does not change while a study runs."""
    text = yaml.safe_dump(spec.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    known: list[dict[str, str]] = study.user_attrs.get("versions", [])
    tags = {f"version.{package}": version for package, version in known[-1].items()} if known else {}
    if len(known) > 1:
        tags["resumed_under_other_versions"] = str(len(known) - 1)
    return StudyView(
        name=spec.name,
        root=spec.root,
        study_yaml=text,
        tags={**tags, "config_sha256": hashlib.sha256(text.encode()).hexdigest()},
        num_trials=spec.num_trials,
        directions=("maximize",),
    )


def trial_views(spec: StudySpec, study: optuna.Study) -> list[TrialView]:
    """Every trial as it is now, by number."""
    return [_trial_view(spec, trial) for trial in study.get_trials(deepcopy=False)]


def reason_text(reason: str | None, message: str | None) -> str | None:
    """Why a trial was pruned or failed, for people."""
    return f"{reason}: {message}" if reason and message else reason


def _trial_view(spec: StudySpec, trial: FrozenTrial) -> TrialView:
    return TrialView(
        number=trial.number,
        state=trial.state.name,
        params=trial.params,
        values=trial.values,
        reason=reason_text(trial.user_attrs.get("reason"), trial.user_attrs.get("message")),
        run=run_dir(spec.root, trial.number),
        start=trial.datetime_start.astimezone() if trial.datetime_start else None,
        end=trial.datetime_complete.astimezone() if trial.datetime_complete else None,
    )
