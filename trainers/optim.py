"""The interface of optimizers, and learning-rate schedules."""

from __future__ import annotations

import math
from abc import abstractmethod
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat
from typing_extensions import override

from trainers.config import Choice
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor
    from torch.optim import Optimizer

Momentum = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Choice):
    """How the learning rate changes with the step; a function of the step alone, so there is nothing to save."""

    decays: ClassVar[bool] = True
    """Whether the rate falls towards the end of training."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate for optimizer step `step` (from 0) out of `steps`."""

    @abstractmethod
    def check(self, steps: int) -> None:
        """Raise ValueError if the schedule does not fit into `steps`."""


class _WarmUp(ScheduleConfig):
    """Linear warm-up from 0, then what a kind makes of the rest."""

    warmup_steps: NonNegativeInt = 0

    @override
    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        return self._after((step - self.warmup_steps) / (steps - self.warmup_steps))

    @override
    def check(self, steps: int) -> None:
        if self.warmup_steps >= steps:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}; expected less than steps ({steps})")

    @abstractmethod
    def _after(self, progress: float) -> float:
        """Factor once warm, at `progress` from 0 to 1."""


class Constant(_WarmUp):
    """Linear warm-up from 0, then the peak, as diffusers' `get_constant_schedule_with_warmup`."""

    kind: Literal["constant"] = "constant"
    decays: ClassVar[bool] = False

    @override
    def _after(self, progress: float) -> float:
        return 1.0


class Linear(_WarmUp):
    """Linear warm-up from 0, then straight down to 0, as diffusers' `get_linear_schedule_with_warmup`."""

    kind: Literal["linear"] = "linear"

    @override
    def _after(self, progress: float) -> float:
        return 1 - progress


class Cosine(_WarmUp):
    """Linear warm-up from 0, then half a cosine down to 0, as diffusers' `get_cosine_schedule_with_warmup`."""

    kind: Literal["cosine"] = "cosine"

    @override
    def _after(self, progress: float) -> float:
        return 0.5 * (1 + math.cos(math.pi * progress))


class OptimizerConfig(Choice):
    """How weights follow gradients."""

    package: ClassVar[str | None] = None
    """Import name of what has to be installed besides this project."""
    averages: ClassVar[bool] = False
    """Whether the weights that are trained and those that are judged differ; see `judged`."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate, before any group's own factor."""

    def check(self) -> None:
        """Find what is missing before anything is loaded.

        Raises:
            ConfigError: The optimizer's package is not installed.
        """
        if self.package and find_spec(self.package) is None:
            raise ConfigError(
                f"train.optimizer: {self.package} is not installed; install the extra 'optimizers' "
                f"(pip install -e '.[optimizers]'), or choose another kind, such as adamw"
            )

    def check_schedule(self, schedule: ScheduleConfig) -> None:
        """Raise ValueError if this optimizer makes no sense with `schedule`."""

    def check_rates(self, scales: Collection[float]) -> None:
        """Raise ValueError if this optimizer cannot train networks at such factors of its rate."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A torch optimizer over parameter groups as torch spells them (`params`, `lr`).

        Raises:
            ConfigError: It cannot optimise these groups.
        """

    def rate(self, group: dict[str, Any]) -> float:
        """The learning rate in effect in one of the optimizer's groups."""
        return group["lr"]

    def judged(self, optimizer: Optimizer) -> list[Tensor] | None:
        """New tensors: what to validate, sample and export with, group after group; None is what is being trained."""
