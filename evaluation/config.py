"""The `evaluate:` section: what is sampled, how, and by what it is judged."""

from collections import Counter
from typing import Annotated, Self, TypeVar

from pydantic import AfterValidator, Field, PositiveInt, model_validator

import evaluation.metrics  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from evaluation.metric import Metric
from trainers.config import Config
from trainers.errors import ModelError
from trainers.guidance import SamplingConfig
from trainers.prompt import Prompt, Seed

T = TypeVar("T")


def _all_different(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = [name for name, count in Counter(map(str, values)).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice; the same picture would be judged twice")
    return values


MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class EvaluateConfig(SamplingConfig):
    """What a trial's samples show, and how they are judged."""

    prompts: Annotated[tuple[Prompt, ...], AfterValidator(_all_different)] = Field(min_length=1)
    """The panel. Standard errors need two or more."""
    class_prompts: Annotated[tuple[Prompt, ...], AfterValidator(_all_different)] = ()
    """Prompts that name the subject's class and not the subject. Metrics that ask what became of the class, such as
    prior_preservation, judge their pictures, and nothing else does."""
    seeds: Annotated[tuple[Seed, ...], AfterValidator(_all_different)] = Field(default=(0,), min_length=1)
    """Each prompt is drawn once with each."""
    metrics: dict[MetricName, Metric] = Field(min_length=1)
    """Each entry's name is its score's name."""

    @model_validator(mode="after")
    def _class_prompts_are_judged(self) -> Self:
        of_class = [name for name, metric in self.metrics.items() if metric.of_class]
        if of_class and not self.class_prompts:
            raise ValueError(f"metric {of_class[0]} judges pictures of class_prompts; got none, expected one or more")
        if self.class_prompts and not of_class:
            raise ValueError("got class_prompts that no metric judges; expected prior_preservation among the metrics")
        if both := set(map(str, self.prompts)) & set(map(str, self.class_prompts)):
            raise ValueError(f"{min(both)!r} is in prompts and in class_prompts; expected it in one of them")
        return self

    @property
    def all_prompts(self) -> tuple[Prompt, ...]:
        """Everything that is drawn with every seed."""
        return (*self.prompts, *self.class_prompts)

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
    """The first prompts and seeds of `evaluate`, drawn and scored as `evaluate` does it, without `class_prompts`."""

    every: PositiveInt
    """Optimizer steps; the end of training has no report, because the whole panel follows."""
    prompts: PositiveInt = 4
    """How many of `evaluate.prompts`."""
    seeds: PositiveInt = 1
    """How many of `evaluate.seeds`."""
