"""What running trials report, told to Optuna and judged by the study's pruner."""

from __future__ import annotations

import math
import operator
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
_JUDGED = "judged"
"""User attribute: the last step whose report did not end the trial."""


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

    def prune(self, trial: Trial) -> bool:
        """Whether the trial is to be ended; each report is judged once, in the order of their steps.

        Of several values, the pruner must condemn the trial by each on its own, and another must have been no worse in
        any of them at that step: whoever may still be on the front goes on. Trials that break a bound are nobody's
        yardstick.
        """
        if not self._spec.pruner.needs_reports or trial.number not in self._undecided:
            return False
        self._undecided.discard(trial.number)
        trials = self._study.get_trials(deepcopy=False)
        own = trials[trial.number]
        others = [other for other in trials if other.number != own.number and _keeps_bounds(other)]
        judged = own.user_attrs.get(_JUDGED, -1)
        for step in sorted(step for step in map(int, own.user_attrs.get(_REPORTS, {})) if step > judged):
            if self._condemns(own, others, step):
                return True
            trial.set_user_attr(_JUDGED, step)
        return False

    def _condemns(self, own: FrozenTrial, others: Sequence[FrozenTrial], step: int) -> bool:
        for place in range(len(self._spec.objective.names)):
            peers = [_curve(other, place) for other in others]
            if not self._spec.pruner.prunes(_curve(own, place, step), peers):
                return False
        return len(self._spec.objective.names) == 1 or _is_beaten(own, others, step)

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


def _curve(trial: FrozenTrial, place: int, until: float = math.inf) -> Curve:
    """A trial along the value at `place`, as it was known after step `until`."""
    known = {int(step): report for step, report in trial.user_attrs.get(_REPORTS, {}).items()}
    reports = {step: report for step, report in known.items() if step <= until}
    return Curve(
        trial.number,
        {step: report["values"][place] for step, report in reports.items()},
        {step: [values[place] for values in report["prompts"]] for step, report in reports.items()},
        trial.values[place] if trial.state is TrialState.COMPLETE else None,
    )


def _keeps_bounds(trial: FrozenTrial) -> bool:
    return all(amount <= 0 for amount in trial.constraints.values())


def _is_beaten(own: FrozenTrial, others: Sequence[FrozenTrial], step: int) -> bool:
    """Whether another trial was no worse in any value at this step, and better in one; undefined is the worst."""

    def values(trial: FrozenTrial) -> tuple[float, ...]:
        report = trial.user_attrs.get(_REPORTS, {}).get(str(step), {"values": []})
        return tuple(-math.inf if math.isnan(value) else value for value in report["values"])

    ours = values(own)
    if not any(map(math.isfinite, ours)):
        return True
    known = [theirs for other in others if (theirs := values(other))]
    return any(theirs != ours and all(map(operator.ge, theirs, ours)) for theirs in known)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
