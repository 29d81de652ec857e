"""What differs between training methods; everything else is `trainers.loop`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from trainers.backbone import BackboneConfig
from trainers.batch import DataConfig
from trainers.config import Choice
from trainers.efficiency import AttentionKernel
from trainers.ema import EmaConfig
from trainers.errors import ConfigError, DataError, ModelError
from trainers.guidance import Guidance
from trainers.loss import LossConfig
from trainers.optim import Cosine, OptimizerConfig, ScheduleConfig
from trainers.optimizers.adamw import AdamW
from trainers.samples import SamplesConfig
from trainers.snapshots import SnapshotsConfig
from trainers.validation import ValidationConfig
from trainers.version import TRAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from jaxtyping import Float
    from torch import Tensor, nn

    from trainers.backbone import Backbone, Model
    from trainers.batch import Batch, Example
    from trainers.prompt import Prompt
    from trainers.version import Lineage


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
    batch_size: int
    """Examples of one optimizer step."""
    examples: tuple[Example, ...]
    """What is trained on, in the order that `Batch.indices` counts."""
    held_out: tuple[Example, ...]
    """What is kept for judging fidelity."""
    unreadable: tuple[Path, ...]
    """Pictures that could not be decoded and were left out."""

    def example(self, index: int) -> Example:
        """What an index of a batch stands for."""
        count = len(self.examples)
        return self.examples[index] if index < count else self.held_out[index - count]

    @property
    def model(self) -> Model:
        """What pictures are drawn from."""
        return self.backbone

    def remember(self, lineage: Lineage) -> None:
        """Let the model that is trained know where what is trained will lie."""
        self.model.lineage = lineage

    def pick(self, step: int, position: int) -> int:
        """Index of the example at `position` of an endless stream, at optimizer step `step`."""
        return self.data.pick(self.examples, self.seed, step, position, self.batch_size)

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
    ema: EmaConfig | None = None
    """An average of the weights to validate, sample and export in their place; null is the weights themselves."""
    gradient_checkpointing: bool = False
    """Compute activations a second time instead of keeping them: less memory, about a third more time."""
    compile_blocks: bool = False
    """Compile the denoiser's transformer blocks with torch.compile; the first steps take minutes."""
    attention: AttentionKernel = "auto"
    """What computes attention in training; auto lets torch choose for each shape."""
    checkpoint_every: PositiveInt = 100
    log_every: PositiveInt = 10
    validation: ValidationConfig | None = None
    """Null evaluates no loss on what is held out."""
    samples: SamplesConfig | None = None
    """Null draws no pictures before training has ended."""
    snapshots: SnapshotsConfig | None = None
    """Null exports nothing before training has ended."""
    weak_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Export the weights of so early a step too, beside the final ones in `weak/`: a worse version of the same model,
    which autoguidance leads away from (Karras et al., 2024, arXiv:2406.02507). Null exports none."""

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        self.schedule.check(self.steps)
        self.optimizer.check_schedule(self.schedule)
        return self

    @model_validator(mode="after")
    def _options_make_sense_together(self) -> Self:
        if self.ema and self.optimizer.averages:
            raise ValueError(
                "ema with an optimizer that averages the weights itself; remove ema, or choose another optimizer"
            )
        if self.weak_step is not None and not 0 < self.weak_step < self.steps:
            raise ValueError(
                f"weak_fraction {self.weak_fraction:g} of {self.steps} steps is step {self.weak_step}; expected one "
                "between the first and the last"
            )
        if self.snapshots and not self.snapshots.count(self.steps):
            raise ValueError(
                f"snapshots every {self.snapshots.every} of {self.steps} steps, not in the first "
                f"{self.snapshots.after}: there is none; lower every or after, or remove snapshots"
            )
        if self.validation:
            self.data.check_validation()
        if self.samples and self.samples.guidance.needs_weak:
            raise ValueError(
                "samples.guidance.weak is checkpoint, which does not exist while training goes on; set it to base, or "
                "samples.guidance to kind cfg"
            )
        if self.samples:
            self.check_guidance(self.samples.guidance)
        return self

    @property
    def has_weak(self) -> bool:
        """Whether a weak version lies in `weak/` of the adapter's folder after training."""
        return self.weak_fraction is not None

    @property
    def num_exports(self) -> int:
        """How many times what is trained lies in the run's directory after training."""
        return 1 + self.has_weak + (self.snapshots.count(self.steps) if self.snapshots else 0)

    @property
    def without_weak(self) -> str | None:
        """What of this training cannot be drawn with beside a weak version of itself, in words; None is nothing."""
        return None

    @property
    def loses_base(self) -> bool:
        """Whether nothing leads back from what is trained to the base."""
        return False

    def whole_networks(self) -> tuple[str, ...]:
        """Networks whose every weight is trained, by the name that `Backbone.networks` gives them."""
        return ()

    def check_guidance(self, guidance: Guidance, *, finished: bool = False) -> None:
        """Refuse guidance by a version of the model that training does not leave behind.

        Args:
            guidance: How pictures are drawn.
            finished: Whether the adapter was trained already; `check_finished` then looks for its weak version.

        Raises:
            ValueError: What is missing, and what to do.
        """
        versions = {term.version for term in guidance.terms()}
        if guidance.needs_weak and not (self.has_weak or finished):
            raise ValueError(
                "guidance.weak is checkpoint, and training exports no weak version; set train.weak_fraction, for "
                "example 0.3, or guidance.weak: base"
            )
        if guidance.needs_weak and self.without_weak:
            raise ValueError(
                f"guidance.weak is checkpoint with {self.without_weak}, whose weak version cannot be drawn with; set "
                "guidance.weak: base"
            )
        if self.loses_base and versions != {TRAINED}:
            raise ValueError(
                "guidance calls upon another version of the model, and weights of the base itself are trained; "
                "expected adapters alone, or guidance of kind cfg"
            )

    @property
    def weak_step(self) -> int | None:
        """After how many steps the weak version is exported."""
        return None if self.weak_fraction is None else round(self.weak_fraction * self.steps)

    def check(self) -> None:
        """Find what is wrong with model and data before an accelerator is asked for, without torch.

        Raises:
            ModelError: As the backbone's `check`.
            DataError: As the data's `check`, or its pictures do not fit the model.
            ConfigError: The optimizer's package is not installed, the loss is not defined for the model, or a prompt
                of `samples` cannot be drawn.
        """
        self.optimizer.check()
        self.backbone.check()
        self.data.check()
        self.loss.check(self.backbone.prediction, self.backbone.num_timesteps)
        factor = self.backbone.downscale
        odd = [size for size in self.data.sizes if size[0] % factor or size[1] % factor]
        if odd:
            raise DataError(f"train.data: pictures of {odd[0]} pixels; expected multiples of {factor} (the model's)")
        if self.samples:
            self.samples.check_model(self.backbone)
            try:
                self.check_prompts(self.samples.prompts, self.samples.resolution)
            except (ConfigError, DataError) as error:
                raise ConfigError(f"train.samples: {error}") from error

    def check_prompts(self, prompts: Iterable[Prompt], resolution: int) -> None:  # noqa: ARG002  by methods
        """Find prompts that cannot be drawn, without torch.

        Args:
            prompts: What pictures are to show.
            resolution: Their height and width in pixels.

        Raises:
            ConfigError: A prompt says something that the model cannot be told, or not what it must be told.
            DataError: A file that a prompt names is missing, or of another kind or size.
        """
        for prompt in prompts:
            prompt.check_plain()

    def check_finished(self, folder: Path, *, weak: bool, any_size: bool = False) -> None:  # noqa: ARG002  by methods
        """Find out, without torch, whether what `load_trained` is to read is there and of this model.

        Args:
            folder: What was trained.
            weak: Whether a weak version must lie in `weak/` of it.
            any_size: Whether an adapter of another rank will do, as it does for drawing.

        Raises:
            ModelError: Something is missing, of another model, or of another size.
        """
        for needed in (folder, folder / "weak") if weak else (folder,):
            if not needed.is_dir():
                what = "an adapter" if needed == folder else "its weak version, which guidance leads away from"
                raise ModelError(f"{needed}: no such folder; expected {what}")

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
