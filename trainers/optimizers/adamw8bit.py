"""AdamW whose moments are kept in eight bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import NonNegativeFloat, PositiveFloat
from typing_extensions import override

from trainers.errors import ConfigError
from trainers.optim import Momentum, OptimizerConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer


class AdamW8bit(OptimizerConfig):
    """AdamW with block-wise quantised moments (Dettmers et al., 2022, arXiv:2110.02861) from bitsandbytes.

    A quarter of the optimizer's memory; worth it when all weights are trained. Tensors of fewer than 4096 numbers, such
    as small adapters, keep moments in float32, as bitsandbytes has it.
    """

    kind: Literal["adamw8bit"] = "adamw8bit"
    package: ClassVar[str | None] = "bitsandbytes"
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8

    @override
    def build(self, groups: list[dict[str, Any]]) -> Optimizer:
        import importlib

        self.check()
        if any(parameter.device.type == "cpu" for group in groups for parameter in group["params"]):
            raise ConfigError("train.optimizer: adamw8bit needs an accelerator and this is a CPU; choose adamw")
        library: Any = importlib.import_module("bitsandbytes")
        options = {"weight_decay": self.weight_decay, "betas": self.betas, "eps": self.eps}
        return library.optim.AdamW8bit(groups, lr=self.lr, **options)
