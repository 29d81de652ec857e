"""An exponential moving average of what is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, PositiveFloat

from trainers.config import Config

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class EmaConfig(Config):
    """Average the weights of all steps, late ones more; the average is what is validated, sampled and exported.

    average <- d average + (1 - d) weights, where d grows with the number n of steps before, up to `decay`: an average
    of few steps must not remember the start.
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Largest d."""
    warmup_power: PositiveFloat | None = None
    """Null: d = (1 + n) / (10 + n), as in TensorFlow. Else d = 1 - (1 + n)^-power, a plain mean for 1; 0.75 for short
    and 2/3 for very long training."""

    def weight(self, step: int) -> float:
        """What d is after optimizer step `step` (from 0), as in `diffusers.training_utils.EMAModel`; 0 at first."""
        if step == 0:
            return 0.0
        warm = (1 + step) / (10 + step) if self.warmup_power is None else 1 - (1 + step) ** -self.warmup_power
        return min(warm, self.decay)

    def update(self, averages: Sequence[Tensor], weights: Sequence[Tensor], step: int) -> None:
        """Move `averages` in place towards the `weights` after optimizer step `step`."""
        new = 1 - self.weight(step)
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight.detach(), new)
