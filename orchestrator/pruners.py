"""Which running trials are not worth their rest: judged by what their jobs reported, and by nothing else.

A decision is a function of reports, so a controller that is killed and started again decides as it would have done.
"""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainers.config import Choice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_MIN_PAIRS = 2


@dataclass(frozen=True)
class Curve:
    """What is known of a trial while it trains."""

    number: int
    reports: Mapping[int, float] = field(default_factory=dict[int, float])
    """Optimizer step to the objective on the report's panel; larger is better."""
    panels: Mapping[int, Sequence[float]] = field(default_factory=dict[int, "Sequence[float]"])
    """The same for each prompt, in the panel's order."""
    final: float | None = None
    """The objective, once the trial was scored; None for trials that run, were pruned or failed."""

    @property
    def last(self) -> int:
        """The newest report's step; -1 before the first."""
        return max(self.reports, default=-1)


class Pruner(Choice):
    """Family of `pruner:` sections."""

    needs_reports: ClassVar[bool] = True
    """Whether it judges by `trial.report`."""

    @abstractmethod
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        """Whether the trial of `own` should end, after its newest report.

        Args:
            own: Has at least one report.
            others: Every other trial of the study.
        """


class NoPruner(Pruner):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"
    needs_reports: ClassVar[bool] = False

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        return False


class PercentilePruner(Pruner):
    """Ends a trial that more than `percentile` percent of the scored ones beat when they were as far."""

    kind: Literal["percentile"] = "percentile"
    percentile: float = Field(default=25.0, gt=0, lt=100)
    """How much of the field goes on: 25 keeps the best quarter."""
    startup_trials: int = Field(default=5, ge=1)
    """Scored trials before anything is pruned."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps that every trial may take."""

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        return _is_behind(own, others, self.percentile, self.startup_trials, self.warmup_steps)


class MedianPruner(Pruner):
    """Ends a trial that more than half of the scored ones beat when they were as far (Golovin et al., 2017)."""

    kind: Literal["median"] = "median"
    startup_trials: int = Field(default=5, ge=1)
    """Scored trials before anything is pruned."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps that every trial may take."""

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        return _is_behind(own, others, 50.0, self.startup_trials, self.warmup_steps)


class AshaPruner(Pruner):
    """Asynchronous successive halving (Li et al., 2018, arXiv:1810.05934).

    A trial goes past `min_steps`, `eta` x `min_steps`, `eta`^2 x `min_steps` … if it is among the best 1/`eta` of those
    that have come so far. Few have come at first, and then only the best goes on.
    """

    kind: Literal["asha"] = "asha"
    min_steps: int = Field(ge=1)
    """Optimizer steps before the first decision."""
    eta: int = Field(default=3, ge=2)
    """One in so many goes on."""

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        return _falls_at_a_rung(own, others, self.min_steps, self.eta)


class HyperbandPruner(Pruner):
    """Several `asha` races side by side that begin to decide at different steps (Li et al., 2018, arXiv:1603.06560).

    A trial's number says which race it is in; races that decide early have more trials.
    """

    kind: Literal["hyperband"] = "hyperband"
    min_steps: int = Field(ge=1)
    """Optimizer steps before the earliest race's first decision."""
    max_steps: int = Field(ge=1)
    """Steps of a whole trial."""
    eta: int = Field(default=3, ge=2)
    """One in so many goes on."""

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.max_steps <= self.min_steps:
            raise ValueError(f"got max_steps {self.max_steps}; expected more than min_steps {self.min_steps}")
        return self

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        race = self.race(own.number)
        peers = [other for other in others if self.race(other.number) == race]
        return _falls_at_a_rung(own, peers, self.min_steps * self.eta**race, self.eta)

    def race(self, number: int) -> int:
        """Which race trial `number` is in; the larger, the later it decides first."""
        shares = self.shares()
        place = zlib.crc32(str(number).encode()) % sum(shares)
        race = 0
        while place >= shares[race]:
            place -= shares[race]
            race += 1
        return race

    def shares(self) -> list[int]:
        """How many trials of a round each race has."""
        count = 1
        while self.min_steps * self.eta**count <= self.max_steps:
            count += 1
        return [math.ceil(count * self.eta ** (count - 1 - race) / (count - race)) for race in range(count)]


class WilcoxonPruner(Pruner):
    """Ends a trial whose prompts are drawn worse, one by one, than the best trial drew them when it was as far.

    Wilcoxon's signed-rank test (1945) over the prompts of the report's panel: what differs between prompts cancels out.
    """

    kind: Literal["wilcoxon"] = "wilcoxon"
    p: float = Field(default=0.1, gt=0, lt=1)
    """Prune below this probability of such a difference by chance."""
    warmup_steps: int = Field(default=0, ge=0)
    """Optimizer steps that every trial may take."""

    @override
    def prunes(self, own: Curve, others: Sequence[Curve]) -> bool:
        scored = [other for other in others if other.final is not None and own.last in other.panels]
        if own.last < self.warmup_steps or own.last not in own.panels or not scored:
            return False
        best = max(scored, key=lambda other: (other.final or 0.0, -other.number)).panels[own.last]
        pairs = zip(own.panels[own.last], best, strict=True)
        differences = [ours - theirs for ours, theirs in pairs if math.isfinite(ours) and math.isfinite(theirs)]
        if len(differences) < _MIN_PAIRS or sum(differences) >= 0:
            return False
        from scipy import stats

        test: Any = stats.wilcoxon  # pyright: ignore[reportUnknownVariableType]
        return bool(test(differences, alternative="less", zero_method="zsplit").pvalue < self.p)


def _is_behind(own: Curve, others: Sequence[Curve], percentile: float, startup: int, warmup: int) -> bool:
    step = own.last
    scored = [other for other in others if other.final is not None]
    if step < warmup or len(scored) < startup:
        return False
    if math.isnan(own.reports[step]):
        return True
    peers = [other.reports[step] for other in scored if step in other.reports]
    better = sum(peer > own.reports[step] for peer in peers)
    return 100 * better > percentile * len(peers)


def _falls_at_a_rung(own: Curve, others: Sequence[Curve], first: int, eta: int) -> bool:
    for rung in _rungs(first, eta, own.last):
        value = _at_rung(own, rung)
        if value is None:
            continue
        if math.isnan(value):
            return True
        if _first_report_from(own, rung) != own.last:
            continue  # decided at an earlier report
        peers = [known for other in others if (known := _at_rung(other, rung)) is not None]
        better = sum(peer > value for peer in peers)
        if better >= max(1, (len(peers) + 1) // eta):
            return True
    return False


def _rungs(first: int, eta: int, last: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= eta


def _first_report_from(curve: Curve, rung: int) -> int:
    return min((step for step in curve.reports if step >= rung), default=-1)


def _at_rung(curve: Curve, rung: int) -> float | None:
    """A trial's value when it came to a rung: its first report from there on."""
    step = _first_report_from(curve, rung)
    return curve.reports[step] if step >= 0 else None
