"""Adam with factored second moments and none of the first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from typing_extensions import override

from trainers.optim import OptimizerConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Adafactor(OptimizerConfig):
    """Rows and columns of second moments instead of matrices (Shazeer & Stern, 2018, arXiv:1804.04235), as in torch.

    Almost no memory. Steps are relative to the root mean square of each weight matrix.
    """

    kind: Literal["adafactor"] = "adafactor"
    lr: PositiveFloat = 1e-2
    """Relative to the size of the weights; the paper's upper bound."""
    weight_decay: NonNegativeFloat = 0.0
    decay_power: float = Field(default=-0.8, lt=0)
    """Second moments are averaged over about t^0.8 steps: the paper's value."""
    clip: PositiveFloat = 1.0
    """Largest root mean square of an update."""
    smallest_size: PositiveFloat = 1e-3
    """What a weight matrix's root mean square counts at least; new adapters begin at 0."""

    @override
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        import torch

        options: dict[str, Any] = {"beta2_decay": self.decay_power, "d": self.clip, "eps": (None, self.smallest_size)}
        return torch.optim.Adafactor(groups, lr=self.lr, weight_decay=self.weight_decay, **options)
