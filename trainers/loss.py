"""What a denoiser predicts, and how errors at different noise levels are weighed; no torch before it is used."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Literal, Self

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator
from typing_extensions import override

from trainers.config import Choice, Config
from trainers.errors import ConfigError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "flow"]
"""The noise; the velocity sqrt(a) noise - sqrt(1 - a) x0 (Salimans & Ho, 2022, arXiv:2202.00512); noise - x0."""


class Weighting(Choice):
    """Family of `loss.weighting` sections: a factor of each example's loss by its signal-to-noise ratio."""

    @abstractmethod
    def weights(self, snr: Float[Tensor, " b"], prediction: Prediction) -> Float[Tensor, " b"]:
        """Factors for examples of the given signal-to-noise ratios a / (1 - a)."""

    @abstractmethod
    def check(self, prediction: Prediction) -> None:
        """Raise ConfigError if the weighting is not defined for what the model predicts."""


class Plain(Weighting):
    """The mean squared error of what the network predicts."""

    kind: Literal["plain"] = "plain"

    @override
    def weights(self, snr: Float[Tensor, " b"], prediction: Prediction) -> Float[Tensor, " b"]:
        return snr.new_ones(snr.shape)

    @override
    def check(self, prediction: Prediction) -> None:
        pass


class MinSnr(Weighting):
    """min-SNR-gamma (Hang et al., 2023, arXiv:2303.09556): in terms of x0, every weight is min(SNR, gamma)."""

    kind: Literal["min_snr"] = "min_snr"
    gamma: PositiveFloat = 5.0

    @override
    def weights(self, snr: Float[Tensor, " b"], prediction: Prediction) -> Float[Tensor, " b"]:
        if prediction == "epsilon":
            return (self.gamma / snr).clamp(max=1)
        return snr.clamp(max=self.gamma) / (snr + 1)

    @override
    def check(self, prediction: Prediction) -> None:
        _refuse_flow("min_snr", prediction)


class Debiased(Weighting):
    """Debiased estimation (Yu et al., 2023, arXiv:2310.08442): 1 / sqrt(SNR) for noise; SNR is cut at 1,000."""

    kind: Literal["debiased"] = "debiased"

    @override
    def weights(self, snr: Float[Tensor, " b"], prediction: Prediction) -> Float[Tensor, " b"]:
        snr = snr.clamp(max=1000)
        # An error of v is that of noise times (SNR + 1) / SNR, so the same weight in terms of noise is this.
        return snr.rsqrt() if prediction == "epsilon" else snr.sqrt() / (snr + 1)

    @override
    def check(self, prediction: Prediction) -> None:
        _refuse_flow("debiased", prediction)


def _refuse_flow(kind: str, prediction: Prediction) -> None:
    if prediction == "flow":
        raise ConfigError(
            f"train.loss.weighting: {kind} weighs signal-to-noise ratios of diffusion; this model learns a flow: "
            "expected {kind: plain}"
        )


class LossConfig(Config):
    """The denoising loss."""

    weighting: Weighting = Plain()
    noise_offset: NonNegativeFloat = 0.0
    """Deviation of a constant that is added to each channel's noise, so that a model learns very dark and very bright
    pictures (Guttenberg, 2023, "Diffusion with offset noise")."""
    timesteps: tuple[NonNegativeInt, NonNegativeInt] | None = None
    """First and last training timestep to draw from; null draws from all. The SDXL refiner's are 0 to 199."""

    def check(self, prediction: Prediction, num_timesteps: int) -> None:
        """Raise ConfigError if the loss is not defined for a model that predicts this at so many timesteps."""
        self.weighting.check(prediction)
        if self.timesteps and self.timesteps[1] >= num_timesteps:
            raise ConfigError(
                f"train.loss.timesteps: the last is {self.timesteps[1]}; expected at most {num_timesteps - 1}, the "
                "model's last"
            )

    @model_validator(mode="after")
    def _band_is_not_empty(self) -> Self:
        if self.timesteps and self.timesteps[0] > self.timesteps[1]:
            raise ValueError(f"timesteps are {self.timesteps}; expected the smaller one first")
        return self
