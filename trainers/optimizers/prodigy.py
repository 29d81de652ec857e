"""Adam that finds its own learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from typing_extensions import override

from trainers.errors import ConfigError
from trainers.optim import Momentum, OptimizerConfig

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch.optim import Optimizer


class Prodigy(OptimizerConfig):
    """Adam whose steps follow an estimate of the distance to go (Mishchenko & Defazio, 2023, arXiv:2306.06101)."""

    kind: Literal["prodigy"] = "prodigy"
    package: ClassVar[str | None] = "prodigyopt"
    lr: PositiveFloat = 1.0
    """Factor of the rate that is found; leave it at 1."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    d0: PositiveFloat = 1e-6
    """First estimate of the distance."""
    d_coef: PositiveFloat = 1.0
    """Factor of the estimate: 0.5 and 2 are sensible."""
    bias_correction: bool = False
    """Adam's; without it the first steps are larger."""
    safeguard_warmup: bool = False
    """Keeps the estimate from growing too far while a schedule warms up."""

    @override
    def check_rates(self, scales: Collection[float]) -> None:
        if len(set(scales)) > 1:
            raise ValueError(
                f"prodigy finds one learning rate for all networks, and their lr_scale are {sorted(set(scales))}; "
                "set every lr_scale to 1, or choose another kind of optimizer"
            )

    @override
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        self.check()
        from prodigyopt import Prodigy as Implementation

        try:
            self.check_rates({group["lr"] / self.lr for group in groups})
        except ValueError as error:
            raise ConfigError(f"train.optimizer: {error}") from error
        options = {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}
        mode = {"use_bias_correction": self.bias_correction, "safeguard_warmup": self.safeguard_warmup}
        return Implementation(groups, lr=self.lr, d0=self.d0, d_coef=self.d_coef, **options, **mode)

    @override
    def rate(self, group: dict[str, Any]) -> float:
        return group["lr"] * group["d"]
