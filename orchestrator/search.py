"""What is searched, and how: parameters and samplers. Optuna is imported when a study is opened, not before.

A draw is a function of (the sampler's seed, the trial's number, the trials so far) and of nothing else: however often
the controller is killed and started again, a study asks for the same trials.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, cast

from pydantic import Field, FiniteFloat, model_validator
from typing_extensions import override

from trainers.config import Choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import optuna
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

Value = str | float | bool | None
"""A value of a parameter; integers are meant too."""

_STEP_TOLERANCE = 1e-8
_LARGEST_GRID = 100_000


class Parameter(Choice):
    """Family of `search:` entries: the values that one dotted path of the trial may take."""

    @abstractmethod
    def distribution(self) -> BaseDistribution:
        """The same for Optuna."""

    @abstractmethod
    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        """The value that the study's sampler draws; the stored one if it was drawn before."""

    @abstractmethod
    def corners(self) -> Sequence[Value]:
        """Values that must each make a valid trial."""

    @abstractmethod
    def contains(self, value: object) -> bool:
        """Whether the search can arrive at `value`."""

    @abstractmethod
    def at(self, fraction: float) -> Value:
        """The value at `fraction`, in [0, 1), of the way through the parameter."""

    @abstractmethod
    def grid(self) -> Sequence[Value] | None:
        """All values, or None if there is no end of them."""


class RealParameter(Parameter):
    """A number in [low, high], uniform or uniform in its logarithm, or in steps."""

    low: FiniteFloat
    high: FiniteFloat
    log: bool = False
    step: FiniteFloat | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, self.step if self.log else None, smallest=0.0 if self.log else None)
        if self.step is not None and not _is_whole((self.high - self.low) / self.step):
            raise ValueError(f"got step {self.step}; expected one that leads from low {self.low} to high {self.high}")
        return self

    @override
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import FloatDistribution

        return FloatDistribution(self.low, self.high, log=self.log, step=self.step)

    @override
    def suggest(self, trial: optuna.Trial, name: str) -> float:
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    @override
    def corners(self) -> Sequence[float]:
        return (self.low, self.high)

    @override
    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        return self.step is None or _is_whole((value - self.low) / self.step)

    @override
    def at(self, fraction: float) -> float:
        if (values := self.grid()) is not None:
            return values[int(fraction * len(values))]
        if self.log:
            return min(self.high, self.low * (self.high / self.low) ** fraction)
        return min(self.high, self.low + fraction * (self.high - self.low))

    @override
    def grid(self) -> Sequence[float] | None:
        if self.step is None:
            return None
        count = round((self.high - self.low) / self.step) + 1
        values = (float(f"{self.low + index * self.step:.12g}") for index in range(count))  # 0.3, not 0.1 + 2 * 0.1
        return [min(self.high, max(self.low, value)) for value in values]


class FloatParameter(RealParameter):
    """A number; its interval is always told."""

    kind: Literal["float"] = "float"


class GuidanceScaleParameter(RealParameter):
    """A scale of guidance, on an interval that holds whatever helps or harms where none is told."""

    kind: Literal["guidance_scale"] = "guidance_scale"
    low: FiniteFloat = -10.0
    high: FiniteFloat = 10.0


class IntParameter(Parameter):
    """A whole number in [low, high], uniform or uniform in its logarithm, or in steps."""

    kind: Literal["int"] = "int"
    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        _check_range(self.low, self.high, self.step if self.log and self.step != 1 else None, 0 if self.log else None)
        if (self.high - self.low) % self.step:
            raise ValueError(f"got step {self.step}; expected one that leads from low {self.low} to high {self.high}")
        return self

    @override
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import IntDistribution

        return IntDistribution(self.low, self.high, log=self.log, step=self.step)

    @override
    def suggest(self, trial: optuna.Trial, name: str) -> int:
        return trial.suggest_int(name, self.low, self.high, log=self.log, step=self.step)

    @override
    def corners(self) -> Sequence[int]:
        return (self.low, self.high)

    @override
    def contains(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int):
            return False
        return self.low <= value <= self.high and (value - self.low) % self.step == 0

    @override
    def at(self, fraction: float) -> int:
        if not self.log:
            return self.grid()[int(fraction * len(self.grid()))]
        low, high = self.low - 0.5, self.high + 0.5  # each whole number owns the half unit on either side
        return min(self.high, max(self.low, round(low * (high / low) ** fraction)))

    @override
    def grid(self) -> Sequence[int]:
        return range(self.low, self.high + 1, self.step)


class CategoricalParameter(Parameter):
    """One of `choices`."""

    kind: Literal["categorical"] = "categorical"
    choices: tuple[bool | int | float | str | None, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _choices_differ(self) -> Self:
        for first, second in itertools.combinations(self.choices, 2):
            if first == second:
                raise ValueError(f"got choices {first!r} and {second!r}, which are equal; expected each choice once")
        return self

    @override
    def distribution(self) -> BaseDistribution:
        from optuna.distributions import CategoricalDistribution

        return CategoricalDistribution(self.choices)

    @override
    def suggest(self, trial: optuna.Trial, name: str) -> Value:
        return trial.suggest_categorical(name, self.choices)

    @override
    def corners(self) -> Sequence[Value]:
        return self.choices

    @override
    def contains(self, value: object) -> bool:
        return value in self.choices

    @override
    def at(self, fraction: float) -> Value:
        return self.choices[int(fraction * len(self.choices))]

    @override
    def grid(self) -> Sequence[Value]:
        return self.choices


def _check_range(low: float, high: float, step: float | None, smallest: float | None) -> None:
    if low >= high:
        raise ValueError(f"got low {low}, high {high}; expected low < high (a fixed value belongs into the trial)")
    if smallest is not None and low <= smallest:
        raise ValueError(f"got low {low} with log: true; expected low > 0")
    if step is not None:
        raise ValueError(f"got step {step} with log: true; expected one of the two (a categorical can list any values)")


def _is_whole(number: float) -> bool:
    return math.isclose(number, round(number), abs_tol=_STEP_TOLERANCE)


class Sampler(Choice):
    """Family of `sampler:` sections."""

    seed: int = Field(default=0, ge=0)
    """Trials of studies with equal seeds are equal as long as their scores are."""
    ends_by: ClassVar[tuple[str, ...]] = ()
    """Options that only say when the search ends; they may change in a study that has begun."""
    begins_itself: ClassVar[bool] = False
    """Whether it says itself what is tried first, so that nothing else can."""
    needs_one_value: ClassVar[bool] = False
    """Whether it cannot follow several values."""

    @abstractmethod
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        """Values for the running `trial`; called again, it returns the same ones."""

    def size(self, space: Mapping[str, Parameter]) -> int | None:  # noqa: ARG002
        """How many different trials there are to ask for; None is no limit. Raises ValueError for a wrong `space`."""
        return None

    def room(self, space: Mapping[str, Parameter], study: optuna.Study) -> int | None:  # noqa: ARG002
        """New trials that can be asked for; None is any number, 0 while nothing runs the end. Raises ConfigError."""
        return None

    def notes(self, space: Mapping[str, Parameter], study: optuna.Study) -> tuple[str, ...]:  # noqa: ARG002
        """What people should know of the search so far, in sentences."""
        return ()


class TpeSampler(Sampler):
    """Tree-structured Parzen estimator (Bergstra et al., 2011), multivariate, as Optuna has it.

    Trials that run at the same time are kept apart by counting them as bad ones (constant liar).
    """

    kind: Literal["tpe"] = "tpe"
    startup_trials: int = Field(default=10, ge=1)
    """Trials that are drawn at random before the estimator has its say."""

    @override
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        import optuna

        seed = int(_rng(self.seed, trial.number).integers(2**31))
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=self.startup_trials)
        together = sampler.sample_relative(study, trial, sampler.infer_relative_search_space(study, trial))
        independent = partial(sampler.sample_independent, study, trial)
        return {
            name: together[name] if name in together else independent(name, parameter.distribution())
            for name, parameter in space.items()
        }


class RandomSampler(Sampler):
    """Independent draws."""

    kind: Literal["random"] = "random"

    @override
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        rng = _rng(self.seed, trial.number)
        return {name: parameter.at(float(rng.random())) for name, parameter in space.items()}


class QmcSampler(Sampler):
    """A scrambled Sobol sequence: fills the space more evenly than random draws. Best with 2^n trials."""

    kind: Literal["qmc"] = "qmc"

    @override
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        from scipy.stats import qmc

        sequence = qmc.Sobol(len(space), scramble=True, rng=_rng(self.seed, 0))
        if trial.number > 1:
            sequence.fast_forward(trial.number - 1)  # the first trial is the study's own defaults
        fractions = sequence.random(1)[0]
        return {name: parameter.at(float(f)) for (name, parameter), f in zip(space.items(), fractions, strict=True)}


class GridSampler(Sampler):
    """Every combination once, in an order shuffled by the seed; a trial that failed is asked for again, last."""

    kind: Literal["grid"] = "grid"

    @override
    def size(self, space: Mapping[str, Parameter]) -> int:
        for name, parameter in space.items():
            if parameter.grid() is None:
                raise ValueError(f"got {name} without `step`; expected one, or a categorical, for a grid")
        size = math.prod(len(parameter.grid() or ()) for parameter in space.values())
        if size > _LARGEST_GRID:
            raise ValueError(f"got a grid of {size} points; expected at most {_LARGEST_GRID}")
        return size

    @override
    def draw(self, space: Mapping[str, Parameter], study: optuna.Study, trial: FrozenTrial) -> dict[str, Value]:
        from optuna.trial import TrialState

        taken, failed = list[dict[str, Value]](), list[dict[str, Value]]()
        for other in study.get_trials(deepcopy=False):
            if other.number < trial.number:
                (failed if other.state is TrialState.FAIL else taken).append(other.params)
        points = self._points(space)
        left = [point for point in points if point not in taken]
        return next((point for point in left if point not in failed), (left or points)[0])

    def _points(self, space: Mapping[str, Parameter]) -> list[dict[str, Value]]:
        grids = [list(parameter.grid() or ()) for parameter in space.values()]
        points = [dict(zip(space, values, strict=True)) for values in itertools.product(*grids)]
        order = cast("list[int]", _rng(self.seed, 0).permutation(len(points)).tolist())
        return [points[index] for index in order]


def _rng(seed: int, number: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng([seed, number])
