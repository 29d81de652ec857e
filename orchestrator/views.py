"""A study as people, trackers and displays see it, read from its storage and its run directories."""

from __future__ import annotations

import hashlib
from datetime import UTC
from typing import TYPE_CHECKING

from orchestrator.tracker import Evidence, StudyView, TrialView
from orchestrator.yaml import dump
from trainers.rundir import RunDir

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import optuna
    from optuna.trial import FrozenTrial

    from orchestrator.spec import StudySpec


def run_dir(root: Path, number: int) -> RunDir:
    """Where trial `number` of the study in `root` lives."""
    return RunDir(root / "trials" / f"{number:04d}")


def study_view(spec: StudySpec, study: optuna.Study, evidence: Evidence | None = None) -> StudyView:
    """What does not change while a study runs, and what was found out at its end."""
    text = dump(spec.model_dump(mode="json"))
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
        value_names=spec.objective.names,
        evidence=evidence,
    )


def trial_views(spec: StudySpec, study: optuna.Study) -> list[TrialView]:
    """Every trial as it is now, by number."""
    return [trial_view(spec, trial) for trial in study.get_trials(deepcopy=False)]


def reason_text(reason: str | None, message: str | None) -> str | None:
    """Why a trial was pruned or failed, for people."""
    return f"{reason}: {message}" if reason and message else reason


def violations(state: str, constraints: Mapping[str, float]) -> dict[str, float]:
    """Bounds that a scored trial breaks, of Optuna's constraints; other trials have none: their reason says it all."""
    return {name: amount for name, amount in constraints.items() if state == "COMPLETE" and amount > 0}


def broken_text(broken: Mapping[str, float]) -> str | None:
    """Which bounds a scored trial breaks, for people."""
    return "breaks " + ", ".join(f"{name} by {amount:.3g}" for name, amount in broken.items()) if broken else None


def trial_view(spec: StudySpec, trial: FrozenTrial) -> TrialView:
    """One trial as it is now."""
    broken = violations(trial.state.name, trial.constraints)
    reason = reason_text(trial.user_attrs.get("reason"), trial.user_attrs.get("message"))
    return TrialView(
        number=trial.number,
        state=trial.state.name,
        params=trial.params,
        values=trial.values,
        reason=reason or broken_text(broken),
        run=run_dir(spec.root, trial.number),
        start=trial.datetime_start and trial.datetime_start.astimezone(UTC),  # trackers know a study by it, anywhere
        end=trial.datetime_complete and trial.datetime_complete.astimezone(UTC),
        violations=broken,
    )
