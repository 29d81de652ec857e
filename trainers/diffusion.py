"""The noise process: what is added to latents, what the network must predict, and how losses are weighted."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainers.errors import ModelError

Prediction = Literal["epsilon", "v_prediction"]

_BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class NoiseProcess:
    """Variance-preserving diffusion in discrete time (Ho et al., 2020, arXiv:2006.11239)."""

    alphas_cumprod: Float[Tensor, " t"]
    """Share of the signal's variance that is left at each training timestep."""
    prediction: Prediction
    """What the network predicts: the noise, or the velocity (Salimans & Ho, 2022, arXiv:2202.00512)."""

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> "NoiseProcess":
        """The process that a model was trained with, from its `scheduler_config.json`, whatever sampler that names.

        Raises:
            ModelError: The configuration has no betas, or the network predicts something else.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        prediction = config.get("prediction_type", "epsilon")
        if prediction not in get_args(Prediction) or not {"beta_start", "trained_betas"} & config.keys():
            raise ModelError(
                f"scheduler_config.json: {config.get('_class_name')} with prediction_type {prediction!r} has no "
                f"training betas; expected a diffusion model that predicts one of {', '.join(get_args(Prediction))}"
            )
        scheduler = cast("Any", DDPMScheduler(**{key: config[key] for key in _BETA_KEYS if key in config}))
        return cls(scheduler.alphas_cumprod, prediction)

    def to(self, device: torch.device) -> "NoiseProcess":
        """The same process with its table on `device`."""
        return NoiseProcess(self.alphas_cumprod.to(device), self.prediction)

    @property
    def num_timesteps(self) -> int:
        """Number of training timesteps; t is in 0 .. num_timesteps - 1."""
        return len(self.alphas_cumprod)

    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """Latents at timestep t: sqrt(a) x0 + sqrt(1 - a) noise."""
        signal, sigma = self._amplitudes(t)
        return signal * x0 + sigma * noise

    def target(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Int[Tensor, " b"]
    ) -> Float[Tensor, "b c h w"]:
        """What the network must answer at timestep t: noise, or sqrt(a) noise - sqrt(1 - a) x0."""
        if self.prediction == "epsilon":
            return noise
        signal, sigma = self._amplitudes(t)
        return signal * noise - sigma * x0

    def snr(self, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Signal-to-noise ratio a / (1 - a)."""
        signal = self.alphas_cumprod[t]
        return signal / (1 - signal)

    def min_snr_weight(self, t: Int[Tensor, " b"], gamma: float) -> Float[Tensor, " b"]:
        """Loss weights of min-SNR-gamma (Hang et al., 2023, arXiv:2303.09556).

        min(SNR, gamma) / SNR for noise and min(SNR, gamma) / (SNR + 1) for velocity: in terms of x0 both are
        min(SNR, gamma).
        """
        snr = self.snr(t)
        if self.prediction == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)

    def _amplitudes(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        signal = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return signal.sqrt(), (1 - signal).sqrt()
