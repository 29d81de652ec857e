"""What running trials report, told to Optuna and judged by the study's pruner."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from orchestrator.pruners import Curve

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

    from orchestrator.spec import StudySpec
    from trainers.rundir import RunDir

_PANELS = "panels"
"""User attribute: step to the objective of each prompt."""


class Reports:
    """Reads `report` events, each once; what is remembered here only saves work, and a new one begins anew."""

    def __init__(self, spec: StudySpec, study: optuna.Study) -> None:
        self._spec, self._study = spec, study
        self._offsets: dict[int, int] = {}
        self._undecided: set[int] = set()

    def read(self, trial: Trial, run: RunDir) -> None:
        """Tell Optuna what the job has reported since the last look. A repetition changes nothing."""
        if trial.number not in self._offsets:
            self._undecided.add(trial.number)  # perhaps a killed controller told, and did not judge
        for offset, event in run.read_events(self._offsets.setdefault(trial.number, 0)):
            self._offsets[trial.number] = offset
            if event["event"] == "report":
                self._tell(trial, event)
                self._undecided.add(trial.number)

    def prune(self, number: int) -> bool:
        """Whether the trial is to be ended; asked once for each report."""
        if not self._spec.pruner.needs_reports or number not in self._undecided:
            return False
        self._undecided.discard(number)
        curves = [_curve(trial) for trial in self._study.get_trials(deepcopy=False)]
        own = curves[number]
        return own.last >= 0 and self._spec.pruner.prunes(own, [curve for curve in curves if curve is not own])

    def verdict(self, number: int) -> str:
        """Where a pruned trial stood, for people."""
        own = _curve(self._study.get_trials(deepcopy=False)[number])
        kind = self._spec.pruner.model_dump()["kind"]
        return f"{kind} ended it after step {own.last}, at {own.reports[own.last]:.4g}"

    def _tell(self, trial: Trial, event: Mapping[str, Any]) -> None:
        known = self._study.get_trials(deepcopy=False)[trial.number]
        if event["step"] in known.intermediate_values:  # a job that was lost repeats what it said
            return
        objective, signs = self._spec.objective, self._spec.trial.evaluate.higher_is_better
        columns = {name: [_number(value) for value in column] for name, column in event["prompts"].items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        panel = [objective.sample_value(row, signs) for row in rows]
        panels = known.user_attrs.get(_PANELS, {})
        trial.set_user_attr(_PANELS, panels | {str(event["step"]): panel})
        means = {name: _number(value) for name, value in event["scores"].items()}
        trial.report(objective.sample_value(means, signs), event["step"])


def _curve(trial: FrozenTrial) -> Curve:
    panels = trial.user_attrs.get(_PANELS, {})
    return Curve(
        trial.number,
        trial.intermediate_values,
        {int(step): panel for step, panel in panels.items()},
        trial.value if trial.state is TrialState.COMPLETE else None,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
