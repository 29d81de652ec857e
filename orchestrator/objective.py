"""What a study maximises: one value or several, made of a trial's scores, and the bounds that a winner must keep."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, FiniteFloat, model_validator
from typing_extensions import override

from trainers.config import Choice, Config
from trainers.rundir import Score

Weights = Annotated[dict[str, FiniteFloat], Field(min_length=1)]
"""Name of an entry of `evaluate.metrics` to its weight; positive means that better scores are wanted."""


class Bound(Config):
    """What one score must keep to. Several may be given; all must hold."""

    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None
    below_base: FiniteFloat | None = Field(default=None, ge=0)
    """How much worse than the untrained model's score it may be, in the score's own unit. The untrained model is
    measured once in a study, on the trial's own panel, before the first trial."""

    @model_validator(mode="after")
    def _can_be_kept(self) -> Self:
        if not self.model_dump(exclude_none=True):
            raise ValueError("got no bound; expected at_least, at_most or below_base")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(f"got at_least {self.at_least} and at_most {self.at_most}; expected the first to be lower")
        return self

    def violations(self, score: Score, base: Score | None) -> dict[str, float]:
        """How far each bound is broken, by its name; zero or less is kept."""
        found: dict[str, float] = {}
        if self.at_least is not None:
            found["at_least"] = self.at_least - score.mean
        if self.at_most is not None:
            found["at_most"] = score.mean - self.at_most
        if self.below_base is not None:
            assert base is not None, "the untrained model is measured first"
            lost = base.mean - score.mean if score.higher_is_better else score.mean - base.mean
            found["below_base"] = lost - self.below_base
        return found


class Objective(Choice):
    """Family of `objective:` sections. Larger values are better, whatever the direction of the scores."""

    @abstractmethod
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        """Name of each value to the factor of each score that it is the sum of."""

    def bounds(self) -> Mapping[str, Bound]:
        """Name of a score to what it must keep to."""
        return {}

    @property
    def names(self) -> tuple[str, ...]:
        """The values' names, in their order."""
        return tuple(self.parts())

    @property
    def needs_base(self) -> bool:
        """Whether a bound speaks of the untrained model."""
        return any(bound.below_base is not None for bound in self.bounds().values())

    def scores_needed(self) -> tuple[str, ...]:
        """Every score that a value or a bound is made of, once."""
        return tuple(dict.fromkeys((*(name for part in self.parts().values() for name in part), *self.bounds())))

    def values(self, scores: Mapping[str, Score]) -> tuple[float, ...]:
        """Sums of factor x mean over the scores; the mean of a score that should be low counts negatively."""
        means = {name: score.mean for name, score in scores.items()}
        return self.sample_values(means, {name: score.higher_is_better for name, score in scores.items()})

    def sample_values(self, values: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> tuple[float, ...]:
        """The same sums for one picture; their means over a panel are the objective's values."""
        return tuple(
            sum(weight * (values[name] if higher_is_better[name] else -values[name]) for name, weight in part.items())
            for part in self.parts().values()
        )

    def violations(self, scores: Mapping[str, Score], base: Mapping[str, Score]) -> dict[str, float]:
        """How far each bound is broken, as `clip_t.at_least`; zero or less is kept.

        Args:
            scores: The trial's.
            base: The untrained model's; empty if no bound speaks of it.
        """
        return {
            f"{name}.{kind}": amount
            for name, bound in self.bounds().items()
            for kind, amount in bound.violations(scores[name], base.get(name)).items()
        }


class MetricObjective(Objective):
    """One score."""

    kind: Literal["metric"] = "metric"
    name: str
    """Name of an entry of `evaluate.metrics`."""

    @override
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        return {"value": {self.name: 1.0}}


class WeightedObjective(Objective):
    """A weighted sum of raw scores: a weight is also the unit in which a score counts."""

    kind: Literal["weighted"] = "weighted"
    weights: Weights

    @override
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        return {"value": self.weights}


class ClipAestheticObjective(Objective):
    """0.6 x CLIP text-image cosine + 0.4 x aesthetic / 10, a named preset for text-to-image tuning."""

    kind: Literal["clip_aesthetic"] = "clip_aesthetic"
    clip: str = "clip_t"
    """Name of the entry of `evaluate.metrics` that measures the cosine."""
    aesthetic: str = "aesthetic"
    """Name of the entry that measures the aesthetic score, which runs from about 0 to 10."""

    @override
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        return {"value": {self.clip: 0.6, self.aesthetic: 0.4 / 10}}


class BoundedObjective(Objective):
    """What the kinds with bounds have in common."""

    subject_to: dict[str, Bound] = Field(default={})
    """Name of an entry of `evaluate.metrics` to what it must keep to. A trial that breaks a bound counts and teaches
    the sampler, but never wins."""

    @override
    def bounds(self) -> Mapping[str, Bound]:
        return self.subject_to


class ConstrainedObjective(BoundedObjective):
    """A weighted sum of raw scores, the largest among the trials that keep every bound."""

    kind: Literal["constrained"] = "constrained"
    maximise: Weights
    subject_to: dict[str, Bound] = Field(min_length=1)

    @override
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        return {"value": self.maximise}


class ParetoObjective(BoundedObjective):
    """Several values at once. The answer is a front: trials that no other equals in all and beats in one."""

    kind: Literal["pareto"] = "pareto"
    objectives: dict[str, Weights] = Field(min_length=2)
    """Name of each value to the weighted sum of raw scores that it is."""

    @override
    def parts(self) -> Mapping[str, Mapping[str, float]]:
        return self.objectives
