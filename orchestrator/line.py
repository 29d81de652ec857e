"""What is known of an objective along one number, and where to look next: a coarse scan, then golden section.

Each next point is a function of the evaluated ones and of nothing else, so a search that was killed asks for the same
point again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.panels import PROMPT_VALUES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from optuna.trial import FrozenTrial

_GOLDEN = (3 - math.sqrt(5)) / 2
"""The next point lies at this fraction of the longer side, seen from the best one (Kiefer, 1953)."""
_SAME = 1e-9
"""Points that are closer than this fraction of the interval are one point."""
_NARROWEST = 4
"""The curvature of a coarse scan understates a narrow peak: the bracket shrinks to this part whatever it says."""
_FINEST = 1e-3
"""Tolerance where no noise is known, as a fraction of the interval."""
_NUM_ERRORS = 2.0
"""Standard errors that make a difference count."""


@dataclass(frozen=True)
class Point:
    """An evaluated place of the line."""

    x: float
    value: float
    """Larger is better; minus infinity for a trial without a value, which breaks every bound."""
    panel: tuple[float, ...] = ()
    """The value of each prompt, in the panel's order; empty if unknown."""
    violation: float = 0.0
    """By how much it breaks the objective's bounds, all of them together; 0 keeps them."""

    @property
    def rank(self) -> tuple[float, float]:
        """Larger is better: whoever keeps all bounds comes before whoever breaks one, and that less before more.

        Golden section asks for nothing but an order. If each bound is broken by more the farther away one is from the
        places that keep it, and the objective has one peak among those, the order has one peak, too.
        """
        return -self.violation, self.value


@dataclass(frozen=True)
class Line:
    """What is known of an objective along one bounded number, and what follows from it.

    Args:
        low, high: The interval.
        scan: Equally spaced points, both ends among them, that are evaluated first.
        max_points: Evaluations at most.
        tolerance: How far the best evaluated point may be from the optimum; None is as fine as the noise allows.
        points: What was evaluated, in any order; a place once.
    """

    low: float
    high: float
    scan: int
    max_points: int
    tolerance: float | None
    points: tuple[Point, ...]

    def missing(self) -> tuple[float, ...]:
        """Places to evaluate next, in order: the rest of the scan, then one at a time; nothing when it is over."""
        if rest := self._unscanned():
            return rest[: max(0, self.max_points - len(self.points))]
        if len(self.points) >= self.max_points:
            return ()
        left, best, right = self.bracket()
        if max(best - left, right - best) <= self.stopping_width():
            return ()
        if right - best > best - left:
            return (best + _GOLDEN * (right - best),)
        return (best - _GOLDEN * (best - left),)

    def best(self) -> Point:
        """The best evaluated point; of equals, the middle one of the first run of them."""
        points = self._sorted()
        top = max(point.rank for point in points)
        first = next(place for place, point in enumerate(points) if point.rank == top)
        last = first
        while last + 1 < len(points) and points[last + 1].rank == top:
            last += 1
        return points[(first + last) // 2]

    def bracket(self) -> tuple[float, float, float]:
        """The best point between its neighbours; at an end of the interval it is its own neighbour."""
        places = [point.x for point in self._sorted()]
        at = places.index(self.best().x)
        return places[max(0, at - 1)], places[at], places[min(len(places) - 1, at + 1)]

    def stopping_width(self) -> float:
        """How far the best point may be from the optimum: the tolerance, or what the noise allows without one."""
        if self.tolerance is not None:
            return self.tolerance
        return max(self.resolution(), _FINEST * (self.high - self.low))

    def resolution(self) -> float:
        """How finely the scores tell places apart; 0 if their noise is not known.

        Near its optimum an objective loses `curvature / 2 * d²` at distance `d`. What is lost within a standard error
        `s` of a paired difference cannot be seen: `d = sqrt(2 s / curvature)`. Scan points alone decide, so that the
        answer stays what it is while the search goes on. Neighbours of equal value leave a quarter of the bracket.
        Where a bound ends the bracket the best place is an edge and no peak, and the scores' noise does not say how
        sharp that is: 0, too.
        """
        scanned = [point for point in self._sorted() if self._is_scanned(point) and math.isfinite(point.value)]
        if len(scanned) < 3:
            return 0.0
        at = max(range(len(scanned)), key=lambda place: scanned[place].rank)
        if any(point.violation > 0 for point in scanned[max(0, at - 1) : at + 2]):
            return 0.0
        at = min(max(at, 1), len(scanned) - 2)
        a, b, c = scanned[at - 1 : at + 2]
        error = max((paired_error(a, b), paired_error(b, c)), key=lambda one: one or 0.0)
        if not error:
            return 0.0
        widest = (c.x - a.x) / _NARROWEST
        slopes = (b.value - a.value) / (b.x - a.x), (c.value - b.value) / (c.x - b.x)
        curvature = 2 * (slopes[0] - slopes[1]) / (c.x - a.x)
        return widest if curvature <= 0 else min(widest, math.sqrt(2 * error / curvature))

    def valley(self) -> tuple[Point, Point] | None:
        """A low point and a higher one beyond it, seen from the best: the objective has more than one peak.

        Differences within two standard errors do not count; points without a value, and those that break a bound, are
        passed over.
        """
        points = [point for point in self._sorted() if math.isfinite(point.value) and point.violation == 0]
        if not points:
            return None
        at = points.index(self.best())
        found = [*_rises(points[at:]), *_rises(points[at::-1])]
        return max(found, key=lambda pair: pair[1].value - pair[0].value, default=None)

    def is_scanned(self) -> bool:
        """Whether the coarse scan is complete."""
        return not self._unscanned()

    def _sorted(self) -> list[Point]:
        return sorted(self.points, key=lambda point: point.x)

    def _scan(self) -> list[float]:
        step = (self.high - self.low) / (self.scan - 1)
        return [self.low + index * step for index in range(self.scan - 1)] + [self.high]

    def _unscanned(self) -> tuple[float, ...]:
        return tuple(x for x in self._scan() if not any(self._same(x, point.x) for point in self.points))

    def _is_scanned(self, point: Point) -> bool:
        return any(self._same(x, point.x) for x in self._scan())

    def _same(self, one: float, other: float) -> bool:
        return abs(one - other) <= _SAME * (self.high - self.low)


def paired_error(one: Point, other: Point) -> float | None:
    """Standard error of the difference of two points on the same prompts; None if it cannot be known."""
    pairs = zip(one.panel, other.panel, strict=True) if len(one.panel) == len(other.panel) else ()
    gains = [b - a for a, b in pairs if math.isfinite(a) and math.isfinite(b)]
    if len(gains) < 2:
        return None
    mean = math.fsum(gains) / len(gains)
    return math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1) / len(gains))


def _rises(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """Points that are higher than the lowest one between them and the first, by more than the noise."""
    lowest = points[0]
    for point in points:
        noise = _NUM_ERRORS * (paired_error(lowest, point) or 0.0)
        if point.value < lowest.value:
            lowest = point
        elif point.value - lowest.value > noise:
            yield lowest, point


def point_of(trial: FrozenTrial, name: str) -> Point | None:
    """What a trial says of its place; None while it runs, and if it failed for a reason of its machine's."""
    from optuna.trial import TrialState

    if name not in trial.params:
        return None
    if trial.state is TrialState.PRUNED:
        return Point(trial.params[name], -math.inf, violation=math.inf)
    if trial.state is not TrialState.COMPLETE or not trial.values:
        return None
    panel = tuple(math.nan if value is None else value for value in trial.user_attrs.get(PROMPT_VALUES, ()))
    broken = math.fsum(amount for amount in trial.constraints.values() if amount > 0)
    return Point(trial.params[name], trial.values[0], panel, broken)


def sentences(line: Line) -> Iterator[str]:
    """What people should know of the search along a line."""
    left, best, right = line.bracket()
    width = max(best - left, right - best)
    yield f"the best evaluated point is {best:.4g}, between {left:.4g} and {right:.4g}"
    if edge := _edge(line):
        yield f"{edge}; the search ends at {_end(line)}"
    elif finest := line.resolution():
        yield f"the measured noise lets places closer than {finest:.2g} look alike; the search ends at {_end(line)}"
    else:
        yield f"the noise of the scores is not known; the search ends at {_end(line)}"
    if best in {line.low, line.high}:
        yield f"the best point is an end of [{line.low:g}, {line.high:g}]: the optimum may lie outside"
    if valley := line.valley():
        low, high = valley
        yield (
            f"the objective is not unimodal: {low.value:.4g} at {low.x:.4g} lies between the best and {high.value:.4g} "
            f"at {high.x:.4g}; the search stays around the highest point of the scan"
        )
    if not line.missing():
        reached = width <= line.stopping_width()
        yield "the search is over" if reached else f"{line.max_points} evaluations are done, at ±{width:.2g}"


def _edge(line: Line) -> str:
    """What bounds have to do with the best point; empty if they have not."""
    broken = [point.x for point in line.points if 0 < point.violation < math.inf]
    left, best, right = line.bracket()
    if best in broken:
        return f"every evaluated point breaks a bound, and {best:.4g} by the least"
    ends = " and ".join(f"{x:.4g}" for x in (left, right) if x in broken)
    return f"a bound is broken at {ends}: the best point is at the edge of what is allowed" if ends else ""


def _end(line: Line) -> str:
    return f"±{line.stopping_width():.2g} or {line.max_points} evaluations"
