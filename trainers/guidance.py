"""How pictures are drawn; guidance is an affine combination of denoiser calls.

Every kind predicts `sum(w_i * denoise(x_t, t, condition_i))` with `sum(w_i) == 1`. The sum constraint makes the
combination meaningful for noise, velocity and flow targets alike, because each of them is affine in the clean image
given `x_t`.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from typing_extensions import override

from trainers.backbone import BackboneConfig, SchedulerName
from trainers.config import Choice, Config
from trainers.errors import ModelError


@dataclass(frozen=True)
class Term:
    """One denoiser call: what it is told, and its coefficient."""

    condition: Literal["prompt", "null"]
    """`null` is the negative prompt, or what the base model was trained to take for no prompt."""
    weight: float


class Guidance(Choice):
    """Family of `guidance:` sections."""

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The calls to combine; weights sum to 1. Calls whose weight is 0 are never made."""


class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598)."""

    kind: Literal["cfg"] = "cfg"
    scale: float = Field(default=5.0, allow_inf_nan=False)
    """1 is unguided and costs half as much; 5 is the stock SDXL pipeline's default."""

    @override
    def terms(self) -> tuple[Term, ...]:
        return (Term("null", 1 - self.scale), Term("prompt", self.scale))


class SamplingConfig(Config):
    """How pictures are drawn."""

    resolution: int = Field(default=1024, ge=8, multiple_of=8)
    """Height and width in pixels."""
    steps: int = Field(default=30, ge=1)
    """Denoiser calls per picture."""
    scheduler: SchedulerName = "ddim"
    """On the model's own betas; DDIM with eta 0."""
    negative_prompt: str | None = None
    """null is what the stock pipeline does without one: zeros if the model's folder says so, else the empty prompt.
    The empty string is the empty prompt."""
    guidance: Guidance = ClassifierFree()
    batch_size: int = Field(default=4, ge=1)
    """Pictures per denoiser call, before guidance multiplies the rows, and per decoder call."""

    def check_model(self, backbone: BackboneConfig) -> None:
        """Find what the model cannot draw, without torch.

        Raises:
            ModelError: It cannot be drawn from with this scheduler, or not at this resolution.
        """
        if self.scheduler not in backbone.schedulers:
            raise ModelError(
                f"scheduler is {self.scheduler}, which cannot draw from this model; expected one of "
                f"{', '.join(backbone.schedulers)}"
            )
        if self.resolution % backbone.downscale:
            raise ModelError(
                f"resolution is {self.resolution}; expected a multiple of {backbone.downscale} (the model's)"
            )
