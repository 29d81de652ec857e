"""Who won: of trials that were scored and keep every bound, those that no other one beats."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.tracker import TrialView


def feasible(trials: Sequence[TrialView]) -> list[tuple[list[float], TrialView]]:
    """Values and trials that may win: scored, and no bound broken; the best first, by the first value."""
    found = [(trial.values, trial) for trial in trials if trial.state == "COMPLETE" and trial.values]
    kept = [(values, trial) for values, trial in found if not trial.violations]
    return sorted(kept, key=lambda pair: ([-value for value in pair[0]], pair[1].number))


def front(trials: Sequence[TrialView]) -> list[TrialView]:
    """The trials of `feasible` that none is at least as good as in every value and better than in one.

    With one value that is the best trial, and those that equal it.
    """
    won: list[tuple[list[float], TrialView]] = []
    for values, trial in feasible(trials):  # whoever beats a trial comes before it
        if not any(beats(best, values) for best, _ in won):
            won.append((values, trial))
    return [trial for _, trial in won]


def beats(one: list[float], other: list[float]) -> bool:
    """Whether `one` is at least as good in every value, and better in one."""
    return one != other and all(first >= second for first, second in zip(one, other, strict=True))
