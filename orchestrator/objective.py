"""What a study maximises: one number made of a trial's scores."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Literal

from pydantic import Field
from typing_extensions import override

from trainers.config import Choice
from trainers.rundir import Score


class Objective(Choice):
    """Family of `objective:` sections. Larger values are better, whatever the direction of the scores."""

    @abstractmethod
    def weights_by_score(self) -> Mapping[str, float]:
        """Factor of each score that the value is the sum of."""

    def value(self, scores: Mapping[str, Score]) -> float:
        """The sum of factor x mean over the scores; the mean of a score that should be low counts negatively."""
        means = {name: score.mean for name, score in scores.items()}
        return self.sample_value(means, {name: score.higher_is_better for name, score in scores.items()})

    def sample_value(self, values: Mapping[str, float], higher_is_better: Mapping[str, bool]) -> float:
        """The same sum for one picture; its mean over a panel is the objective's value."""
        return sum(
            weight * (values[name] if higher_is_better[name] else -values[name])
            for name, weight in self.weights_by_score().items()
        )


class MetricObjective(Objective):
    """One score."""

    kind: Literal["metric"] = "metric"
    name: str
    """Name of an entry of `evaluate.metrics`."""

    @override
    def weights_by_score(self) -> Mapping[str, float]:
        return {self.name: 1.0}


class WeightedObjective(Objective):
    """A weighted sum of raw scores: a weight is also the unit in which a score counts."""

    kind: Literal["weighted"] = "weighted"
    weights: dict[str, float] = Field(min_length=1)
    """Name of an entry of `evaluate.metrics` to its weight; positive means that better scores are wanted."""

    @override
    def weights_by_score(self) -> Mapping[str, float]:
        return self.weights


class ClipAestheticObjective(Objective):
    """0.6 x CLIP text-image cosine + 0.4 x aesthetic / 10, a named preset for text-to-image tuning."""

    kind: Literal["clip_aesthetic"] = "clip_aesthetic"
    clip: str = "clip_t"
    """Name of the entry of `evaluate.metrics` that measures the cosine."""
    aesthetic: str = "aesthetic"
    """Name of the entry that measures the aesthetic score, which runs from about 0 to 10."""

    @override
    def weights_by_score(self) -> Mapping[str, float]:
        return {self.clip: 0.6, self.aesthetic: 0.4 / 10}
