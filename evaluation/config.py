"""The `evaluate:` section: what is sampled, how, and by what it is judged."""

from collections import Counter
from typing import Annotated, TypeVar

from pydantic import AfterValidator, Field

import evaluation.metrics  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from evaluation.guidance import ClassifierFree, Guidance
from evaluation.metric import Metric
from trainers.backbone import SchedulerName
from trainers.config import Config
from trainers.errors import ModelError

T = TypeVar("T")


def _all_different(values: tuple[T, ...]) -> tuple[T, ...]:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is listed twice; the same picture would be judged twice")
    return values


Prompt = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MetricName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class SamplingConfig(Config):
    """How pictures are drawn."""

    resolution: int = Field(default=1024, ge=8, multiple_of=8)
    """Height and width in pixels."""
    steps: int = Field(default=30, ge=1)
    """Denoiser calls per picture."""
    scheduler: SchedulerName = "ddim"
    """On the model's own betas; DDIM with eta 0."""
    negative_prompt: str | None = None
    """null is what the stock pipeline does without one: zeros if the model's folder says so, else the empty prompt.
    The empty string is the empty prompt."""
    guidance: Guidance = ClassifierFree()
    batch_size: int = Field(default=4, ge=1)
    """Pictures per denoiser call, before guidance multiplies the rows, and per decoder call."""


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
