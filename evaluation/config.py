"""The `evaluate:` section: what is sampled, how, and by what it is judged."""

from collections import Counter
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field, PositiveInt

import evaluation.metrics  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from evaluation.metric import Metric
from trainers.config import Config
from trainers.errors import ModelError
from trainers.guidance import SamplingConfig
from trainers.prompt import Prompt

T = TypeVar("T")


def _all_different(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = [name for name, count in Counter(map(str, values)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice; the same picture would be judged twice")
    return values


MAX_SEED = 2**63
"""What numpy's seed sequences and a file's columns hold."""
Seed = Annotated[int, Field(ge=0, lt=MAX_SEED)]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class EvaluateConfig(SamplingConfig):
    """What a trial's samples show, and how they are judged."""

    prompts: Annotated[tuple[Prompt, ...], AfterValidator(_all_different)] = Field(min_length=1)
    """The panel. Standard errors need two or more."""
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_all_different)] = Field(default=(0,), min_length=1)
    """Each prompt is drawn once with each."""
    metrics: dict[MetricName, Metric] = Field(min_length=1)
    """Each entry's name is its score's name."""

    @property
    def needs_references(self) -> bool:
        """Whether a metric compares with held-out pictures."""
        return any(metric.needs_references for metric in self.metrics.values())

    @property
    def higher_is_better(self) -> dict[str, bool]:
        """The direction of each metric."""
        return {name: metric.higher_is_better for name, metric in self.metrics.items()}

    def check(self) -> None:
        """Look for every file that scoring needs, without torch.

        Raises:
            ModelError: One is missing or is visibly of another kind; the message begins with the metric's name.
        """
        for name, metric in self.metrics.items():
            try:
                metric.check()
            except ModelError as error:
                raise ModelError(f"metrics.{name}: {error}") from error


class ReportConfig(Config):
    """The first prompts and seeds of `evaluate`, drawn and scored as `evaluate` does it."""

    every: PositiveInt
    """Optimizer steps; the end of training has no report, because the whole panel follows."""
    prompts: PositiveInt = 4
    """How many of `evaluate.prompts`."""
    seeds: PositiveInt = 1
    """How many of `evaluate.seeds`."""
