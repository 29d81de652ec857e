"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from typing_extensions import override

from trainers.config import Choice

if TYPE_CHECKING:
    from torch.optim import Optimizer

Momentum = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Choice):
    """How weights follow gradients."""

    lr: PositiveFloat = 1e-4
    """Peak learning rate, before any group's own factor."""

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        """A torch optimizer over parameter groups as torch spells them (`params`, `lr`)."""


class AdamW(OptimizerConfig):
    """Adam with decoupled weight decay (Loshchilov & Hutter, 2019, arXiv:1711.05101)."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    @override
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        options = {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}
        return torch.optim.AdamW(groups, lr=self.lr, fused=True, **options)  # pyright: ignore[reportArgumentType]


class ScheduleConfig(Choice):
    """How the learning rate changes with the step; a function of the step alone, so there is nothing to save."""

    @abstractmethod
    def factor(self, step: int, steps: int) -> float:
        """Factor of the learning rate for optimizer step `step` (from 0) out of `steps`."""

    @abstractmethod
    def check(self, steps: int) -> None:
        """Raise ValueError if the schedule does not fit into `steps`."""


class Cosine(ScheduleConfig):
    """Linear warm-up from 0, then half a cosine down to 0, as diffusers' `get_cosine_schedule_with_warmup`."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: NonNegativeInt = 0

    @override
    def factor(self, step: int, steps: int) -> float:
        if step < self.warmup_steps:
            return step / self.warmup_steps
        progress = (step - self.warmup_steps) / (steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * progress))

    @override
    def check(self, steps: int) -> None:
        if self.warmup_steps >= steps:
            raise ValueError(f"schedule.warmup_steps is {self.warmup_steps}; expected less than steps ({steps})")
