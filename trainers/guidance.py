"""How pictures are drawn; guidance is an affine combination of denoiser calls.

Every kind predicts `sum(w_i * denoise_i(x_t, t, condition_i))` with `sum(w_i) == 1`, where `denoise_i` has the trained
weights or another version of them. The sum constraint makes the combination meaningful for noise, velocity and flow
targets alike, because each of them is affine in the clean image given `x_t`.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from typing_extensions import override

from trainers.backbone import BackboneConfig, SchedulerName
from trainers.config import Choice, Config
from trainers.errors import ModelError
from trainers.version import BASE, TRAINED, WEAK, Version

_ROUNDING = 1e-9
"""Of fractions that are written in decimals."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True)
class Term:
    """One denoiser call: what it is told, its coefficient, and the weights that predict."""

    condition: Literal["prompt", "null"]
    """`null` is the negative prompt, or what the base model was trained to take for no prompt."""
    weight: float
    version: Version = TRAINED


class Interval(Config):
    """The noise levels at which pictures are guided (Kynkaanniemi et al., 2024, arXiv:2404.07724)."""

    start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the training timesteps that lie behind: 0 is pure noise. It does not depend on how many steps a sampler
    takes."""
    end: float = Field(default=1.0, gt=0, le=1)
    """Likewise; the first level that is no longer guided."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.start >= self.end:
            raise ValueError(f"the interval starts at {self.start:g} and ends at {self.end:g}; expected start < end")
        return self

    def holds(self, behind: float) -> bool:
        """Whether a noise level is guided."""
        return self.start - _ROUNDING <= behind < self.end - _ROUNDING


class Guidance(Choice):
    """Family of `guidance:` sections."""

    interval: Interval = Interval()
    """Where pictures are guided; elsewhere the trained model predicts alone, told the prompt."""

    @property
    def needs_weak(self) -> bool:
        """Whether a weak version of what was trained must have been exported."""
        return any(term.version.weak for term in self.terms())

    @abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """The calls to combine; weights sum to 1. Calls whose weight is 0 are never made."""

    def calls(self, behind: float) -> tuple[Term, ...]:
        """The calls that are made at a noise level, given as the share of the training timesteps that lie behind."""
        if not self.interval.holds(behind):
            return (Term("prompt", 1.0),)
        terms = self.terms()
        size = sum(abs(term.weight) for term in terms)
        assert math.isclose(sum(term.weight for term in terms), 1, abs_tol=_ROUNDING * (1 + size)), terms
        return tuple(term for term in terms if term.weight != 0)


class ClassifierFree(Guidance):
    """Classifier-free guidance (Ho & Salimans, 2022, arXiv:2207.12598)."""

    kind: Literal["cfg"] = "cfg"
    scale: Finite = 5.0
    """1 is unguided and costs half as much; 5 is the stock SDXL pipeline's default."""

    @override
    def terms(self) -> tuple[Term, ...]:
        return (Term("null", 1 - self.scale), Term("prompt", self.scale))


class AutoGuidance(Guidance):
    """Away from a worse version of the same model (Karras et al., 2024, arXiv:2406.02507), with CFG inside both."""

    kind: Literal["autoguidance"] = "autoguidance"
    scale: Finite = 2.0
    """1 is the trained model alone; 0 the weak one alone."""
    cfg_scale: Finite = 5.0
    """Of the classifier-free guidance inside both models; 1 is none, and half as many calls."""
    weak: Literal["checkpoint", "base"] = "checkpoint"
    """`checkpoint` is what `weak_fraction` exported, in `weak/` of the adapter's folder; `base` the untrained model."""

    @override
    def terms(self) -> tuple[Term, ...]:
        weak = BASE if self.weak == "base" else WEAK
        outer, inner = self.scale, self.cfg_scale
        return (
            Term("null", (1 - outer) * (1 - inner), weak),
            Term("prompt", (1 - outer) * inner, weak),
            Term("null", outer * (1 - inner)),
            Term("prompt", outer * inner),
        )


class WeightInterpolated(Guidance):
    """From the null prediction of weights between base and trained (Park et al., 2025, arXiv:2508.00319)."""

    kind: Literal["wig"] = "wig"
    scale: Finite = 5.0
    """1 is unguided."""
    omega: float = Field(default=0.0, ge=0, le=1)
    """The null prediction is that of weights (1 - omega) base + omega trained, which is the adapter at scale omega. 0
    is the base; 1 is classifier-free guidance."""

    @override
    def terms(self) -> tuple[Term, ...]:
        return (Term("null", 1 - self.scale, Version(scale=self.omega)), Term("prompt", self.scale))


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
