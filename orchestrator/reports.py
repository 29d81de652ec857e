"""What running trials report, told to Optuna and judged by the study's pruner."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from orchestrator.pruners import Curve

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial, Trial

    from orchestrator.spec import StudySpec
    from trainers.rundir import RunDir

_REPORTS = "reports"
"""User attribute: step to the objective's values, and to those of each prompt. Optuna keeps one value only."""


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
        """Whether the trial is to be ended; asked once for each report.

        Of several values, the pruner must condemn the trial by each on its own: whoever may still be the best in one
        may still be on the front. Trials that break a bound are nobody's yardstick.
        """
        if not self._spec.pruner.needs_reports or number not in self._undecided:
            return False
        self._undecided.discard(number)
        trials = self._study.get_trials(deepcopy=False)
        return all(self._condemns(trials, number, place) for place in range(len(self._spec.objective.names)))

    def _condemns(self, trials: Sequence[FrozenTrial], number: int, place: int) -> bool:
        curves = [_curve(trial, place) for trial in trials]
        own = curves[number]
        return own.last >= 0 and self._spec.pruner.prunes(own, [curve for curve in curves if curve is not own])

    def verdict(self, number: int) -> str:
        """Where a pruned trial stood, for people."""
        step, report = max((int(step), known) for step, known in _reports(self._study, number).items())
        values = ", ".join(f"{value:.4g}" for value in report["values"])
        return f"{self._spec.pruner.model_dump()['kind']} ended it after step {step}, at {values}"

    def _tell(self, trial: Trial, event: Mapping[str, Any]) -> None:
        known, step = _reports(self._study, trial.number), event["step"]
        if str(step) in known:  # a job that was lost repeats what it said
            return
        objective, signs = self._spec.objective, self._spec.trial.evaluate.higher_is_better
        columns = {name: [_number(value) for value in column] for name, column in event["prompts"].items()}
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        means = {name: _number(value) for name, value in event["scores"].items()}
        values = objective.sample_values(means, signs)
        report = {"values": values, "prompts": [objective.sample_values(row, signs) for row in rows]}
        if len(values) == 1 and step not in self._frozen(trial).intermediate_values:
            trial.report(values[0], step)  # of several values Optuna takes no report
        trial.set_user_attr(_REPORTS, known | {str(step): report})

    def _frozen(self, trial: Trial) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[trial.number]


def _reports(study: optuna.Study, number: int) -> dict[str, Any]:
    return study.get_trials(deepcopy=False)[number].user_attrs.get(_REPORTS, {})


def _curve(trial: FrozenTrial, place: int) -> Curve:
    """A trial along the value at `place`."""
    reports = {int(step): report for step, report in trial.user_attrs.get(_REPORTS, {}).items()}
    is_yardstick = trial.state is TrialState.COMPLETE and all(amount <= 0 for amount in trial.constraints.values())
    return Curve(
        trial.number,
        {step: report["values"][place] for step, report in reports.items()},
        {step: [values[place] for values in report["prompts"]] for step, report in reports.items()},
        trial.values[place] if is_yardstick else None,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
