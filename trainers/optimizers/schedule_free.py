"""AdamW that averages in place of a schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from typing_extensions import override

from trainers.optim import Momentum, OptimizerConfig

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from trainers.optim import ScheduleConfig


class ScheduleFree(OptimizerConfig):
    """Schedule-free AdamW (Defazio et al., 2024, arXiv:2405.15682).

    Gradients are taken between a fast iterate and its average; the average is what is judged.
    """

    kind: Literal["schedule_free"] = "schedule_free"
    package: ClassVar[str | None] = "schedulefree"
    averages: ClassVar[bool] = True
    lr: PositiveFloat = 2.5e-3
    """Larger than AdamW's: the package's default."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(gt=0, lt=1)], Momentum] = (0.9, 0.999)
    """The first is how far from the fast iterate to the average gradients are taken."""
    eps: PositiveFloat = 1e-8

    @override
    def check_schedule(self, schedule: ScheduleConfig) -> None:
        if schedule.decays:
            raise ValueError(
                "optimizer schedule_free averages in place of a falling learning rate; "
                "write schedule: {kind: constant}, with warmup_steps if you like"
            )

    @override
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        self.check()
        from schedulefree import AdamWScheduleFree

        options: dict[str, Any] = {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}
        optimizer = AdamWScheduleFree(groups, lr=self.lr, **options)
        optimizer.train()
        return optimizer

    @override
    def judged(self, optimizer: Optimizer) -> list[Tensor] | None:
        """The average x, from the point y where gradients are taken and the fast iterate z: y = (1 - b) z + b x."""
        import torch

        averages: list[Tensor] = []
        for group in optimizer.param_groups:
            weight = 1 - 1 / group["betas"][0]
            for parameter in group["params"]:
                z = optimizer.state[parameter].get("z", parameter)
                averages.append(torch.lerp(parameter.detach(), z.detach(), weight))
        return averages
