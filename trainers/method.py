"""What differs between training methods; everything else is `trainers.loop`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from trainers.backbone import BackboneConfig
from trainers.batch import DataConfig
from trainers.config import Choice
from trainers.errors import DataError
from trainers.loss import LossConfig
from trainers.optim import Cosine, OptimizerConfig, ScheduleConfig
from trainers.optimizers.adamw import AdamW

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor, nn

    from trainers.backbone import Backbone, Model
    from trainers.batch import Batch, Example


@dataclass(frozen=True)
class Trained:
    """A network that training changes: all its parameters that require gradients, and no other."""

    network: nn.Module
    lr_scale: float = 1.0
    """Factor of the optimizer's learning rate."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {name: value for name, value in self.network.named_parameters() if value.requires_grad}


class Method(ABC):
    """A way of fine-tuning, ready to run: weights loaded, adapters added, frozen work done."""

    backbone: Backbone
    data: DataConfig
    seed: int
    examples: tuple[Example, ...]
    """What is trained on, in the order that `Batch.indices` counts."""
    held_out: tuple[Example, ...]
    """What is kept for judging fidelity."""
    unreadable: tuple[Path, ...]
    """Pictures that could not be decoded and were left out."""

    @property
    def model(self) -> Model:
        """What pictures are drawn from."""
        return self.backbone

    def pick(self, step: int, position: int) -> int:
        """Index of the example at `position` of an endless stream, at optimizer step `step`."""
        return self.data.pick(self.examples, self.seed, step, position)

    @abstractmethod
    def trained(self) -> Mapping[str, Trained]:
        """Networks to optimise and checkpoint, by name."""

    @abstractmethod
    def losses(self, batch: Batch) -> Float[Tensor, " b"]:
        """Each row's weighted loss, under the caller's autocast."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what was trained, in the format that users load."""


class MethodConfig(Choice):
    """What every training method needs to be told."""

    backbone: BackboneConfig
    data: DataConfig
    optimizer: OptimizerConfig = AdamW()
    schedule: ScheduleConfig = Cosine()
    loss: LossConfig = LossConfig()
    steps: PositiveInt
    """Optimizer steps."""
    batch_size: PositiveInt
    """Examples per optimizer step, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Examples per forward pass of one process; null is all of its share. It does not change the mathematics."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the frozen weights and of arithmetic under autocast; trainable weights are always float32."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients of a larger norm are scaled down to it."""
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 10

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        self.schedule.check(self.steps)
        self.optimizer.check_schedule(self.schedule)
        return self

    def check(self) -> None:
        """Find what is wrong with model and data before an accelerator is asked for, without torch.

        Raises:
            ModelError: As the backbone's `check`.
            DataError: As the data's `check`, or its pictures do not fit the model.
            ConfigError: The optimizer's package is not installed, or the loss is not defined for the model.
        """
        self.optimizer.check()
        self.backbone.check()
        self.data.check()
        self.loss.weighting.check(self.backbone.prediction)
        factor = self.backbone.downscale
        if any(side % factor for side in self.data.size):
            raise DataError(
                f"train.data: pictures of {self.data.size} pixels; expected multiples of {factor} (the model's)"
            )

    def frozen_dtype(self) -> torch.dtype:
        """What `precision` means for weights that are not trained."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    @abstractmethod
    def num_trainable(self) -> int:
        """How many numbers are trained, found without torch."""

    @abstractmethod
    def build(self, seed: int, cache: Path | None, accelerator: Accelerator) -> Method:
        """Load the model, add what is to be trained, and do the frozen work.

        Args:
            seed: The trial's.
            cache: Folder of frozen work shared by all trials; null computes everything anew.
            accelerator: This process's device and its peers.
        """

    @abstractmethod
    def load_trained(self, folder: Path | None, accelerator: Accelerator) -> Model:
        """What pictures are drawn from after training.

        Args:
            folder: What `Method.export` wrote; null is the model before it is trained.
            accelerator: This process's device.

        Raises:
            ModelError: Nothing of this method is in `folder`.
        """
