"""AdamW from torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from typing_extensions import override

from trainers.optim import Momentum, OptimizerConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


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
