"""Samplers that search along a line: golden section of one number, alone or together with a grid of another one.

Each next point is a function of the finished trials and of nothing else: a search that was killed asks for it again.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator
from typing_extensions import override

from orchestrator.line import Line, Point, point_of, sentences
from orchestrator.search import Parameter, RealParameter, Sampler, Value
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import optuna
    from optuna.trial import FrozenTrial

Place = dict[str, Value]


class LineSampler(Sampler):
    """What golden section needs to be told, and how its points become trials.

    The scan finds the bracket and says whether there is more than one peak; its trials may run at the same time, those
    of golden section run one by one. The first trial, the study's own defaults, counts as one of the points. A failed
    trial is asked for again; a pruned one is a bad point. The best *evaluated* point wins.
    """

    ends_by: ClassVar[tuple[str, ...]] = ("tolerance", "max_evaluations")
    begins_itself: ClassVar[bool] = True
    needs_one_value: ClassVar[bool] = True
    scan: int = Field(default=6, ge=3)
    """Equally spaced points, both ends among them, that are evaluated first."""
    max_evaluations: int = Field(default=14, ge=4)
    """Of a line."""
    tolerance: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """How far the best evaluated point may be from the optimum, in the parameter's units; the search ends there. null
    is as fine as the noise of the scores allows; a smaller number than that is refused once the noise is known."""

    @model_validator(mode="after")
    def _scan_fits(self) -> Self:
        if self.max_evaluations <= self.scan:
            raise ValueError(
                f"got scan {self.scan} and max_evaluations {self.max_evaluations}; expected more evaluations than the "
                "scan has, because the first trial is the study's own defaults"
            )
        return self

    @abstractmethod
    def missing(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Iterator[Place]:
        """Places that are to be evaluated next, in order; those that are being evaluated are among them."""

    @abstractmethod
    def lines(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Mapping[str, Line]:
        """The lines that are searched, by what people should read of them."""

    @override
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        before = [other for other in study.get_trials(deepcopy=False) if other.number < trial.number]
        taken = [other.params for other in before if not other.state.is_finished()]
        free = (place for place in self.missing(space, before) if place not in taken)
        # Nothing is free for a trial whose values are drawn already.
        return next(free, {name: parameter.corners()[0] for name, parameter in space.items()})

    @override
    def room(self, space: Mapping[str, Parameter], study: optuna.Study) -> int:
        trials = study.get_trials(deepcopy=False)
        for line in self.lines(space, trials).values():
            self._check_tolerance(line)
        running = sum(not trial.state.is_finished() for trial in trials)
        if not trials:
            return 1
        return max(0, len(list(self.missing(space, trials))) - running)

    @override
    def notes(self, space: Mapping[str, Parameter], study: optuna.Study) -> tuple[str, ...]:
        lines = self.lines(space, study.get_trials(deepcopy=False))
        return tuple(f"{name}: {text}" for name, line in lines.items() if line.is_scanned() for text in sentences(line))

    def along(self, name: str, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Line:
        """The line of parameter `name` that these trials lie on; of trials at one place the first counts."""
        interval = cast("RealParameter", space[name])
        points: dict[float, Point] = {}
        for trial in trials:
            if (point := point_of(trial, name)) is not None:
                points.setdefault(point.x, point)
        found = tuple(points.values())
        return Line(interval.low, interval.high, self.scan, self.max_evaluations, self.tolerance, found)

    def _check_tolerance(self, line: Line) -> None:
        finest = line.resolution() if line.is_scanned() else 0.0
        if self.tolerance is not None and self.tolerance < finest:
            raise ConfigError(
                f"sampler.tolerance: got {self.tolerance:g}; expected at least {finest:.2g}, because the noise that "
                "was measured on this panel hides smaller differences; raise it or set it to null, or judge by more "
                "prompts or seeds in a study of another name (four times as many halve the noise)"
            )


class GoldenSectionSampler(LineSampler):
    """Golden-section search (Kiefer, 1953) of the one float parameter, after a coarse scan of its range."""

    kind: Literal["golden_section"] = "golden_section"

    @override
    def size(self, space: Mapping[str, Parameter]) -> int:
        parameters = list(space.values())
        if len(parameters) != 1 or not _is_continuous(parameters[0]):
            raise ValueError(
                f"got a search of {', '.join(space) or 'nothing'}; expected exactly one float without `log` or `step` "
                "for golden section"
            )
        return self.max_evaluations

    @override
    def missing(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Iterator[Place]:
        (name,) = space
        return ({name: x} for x in self.along(name, space, trials).missing())

    @override
    def lines(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Mapping[str, Line]:
        (name,) = space
        return {name: self.along(name, space, trials)}


class NestedSampler(LineSampler):
    """Golden section of one number for each value of another: the best pair, for as many lines as there are values."""

    kind: Literal["nested"] = "nested"

    @override
    def size(self, space: Mapping[str, Parameter]) -> int:
        _, grid = _roles(space)
        return self.max_evaluations * len(space[grid].grid() or ())

    @override
    def missing(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Iterator[Place]:
        name, grid = _roles(space)
        for value in space[grid].grid() or ():
            line = self.along(name, space, _at(trials, grid, value))
            yield from ({name: x, grid: value} for x in line.missing())

    @override
    def lines(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Mapping[str, Line]:
        name, grid = _roles(space)
        values = space[grid].grid() or ()
        return {f"{name} at {grid}={value}": self.along(name, space, _at(trials, grid, value)) for value in values}


class CoordinateSampler(LineSampler):
    """One number after the other: golden section with the other's default, then the other's grid at the best point.

    It finds the best pair only where the best value of one does not depend on the other.
    """

    kind: Literal["coordinate"] = "coordinate"

    @override
    def size(self, space: Mapping[str, Parameter]) -> int:
        _, grid = _roles(space)
        return self.max_evaluations + len(space[grid].grid() or ()) - 1

    @override
    def missing(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Iterator[Place]:
        name, grid = _roles(space)
        if not trials:
            return
        start = trials[0].params[grid]  # the study's own default
        line = self.along(name, space, _at(trials, grid, start))
        if rest := line.missing():
            yield from ({name: x, grid: start} for x in rest)
            return
        best = line.best().x
        known = [trial.params[grid] for trial in _at(trials, name, best) if point_of(trial, name) is not None]
        yield from ({name: best, grid: value} for value in space[grid].grid() or () if value not in known)

    @override
    def lines(self, space: Mapping[str, Parameter], trials: Sequence[FrozenTrial]) -> Mapping[str, Line]:
        name, grid = _roles(space)
        if not trials or grid not in trials[0].params:
            return {}
        start = trials[0].params[grid]
        return {f"{name} at {grid}={start}": self.along(name, space, _at(trials, grid, start))}


def _is_continuous(parameter: Parameter) -> bool:
    return isinstance(parameter, RealParameter) and not parameter.log and parameter.step is None


def _roles(space: Mapping[str, Parameter]) -> tuple[str, str]:
    """The parameter that golden section is for, and the one whose values are listed. Raises ValueError."""
    line = [name for name, parameter in space.items() if _is_continuous(parameter)]
    listed = [name for name, parameter in space.items() if parameter.grid() is not None]
    if len(space) != 2 or len(line) != 1 or len(listed) != 1:
        raise ValueError(
            f"got a search of {', '.join(space) or 'nothing'}; expected two parameters: a float without `log` or "
            "`step` for golden section, and one of listed values (a float with `step`, an int or a categorical)"
        )
    return line[0], listed[0]


def _at(trials: Sequence[FrozenTrial], name: str, value: Value) -> list[FrozenTrial]:
    return [trial for trial in trials if name in trial.params and trial.params[name] == value]
