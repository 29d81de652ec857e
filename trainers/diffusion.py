"""The noise process: what is added to latents, and what the network must predict."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainers.errors import ModelError
from trainers.loss import Prediction

_BETA_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)


class NoiseProcess(ABC):
    """How latents become noise, seen from training."""

    prediction: Prediction
    num_timesteps: int
    """Number of training timesteps; 0 is the least noisy."""

    def draw_t(self, rng: torch.Generator, band: tuple[int, int] | None = None) -> Tensor:
        """One training timestep, as the network is told it; `band` is the first and last to draw from."""
        low, count = self._band(band)
        return self.timestep(torch.randint(low, low + count, (), generator=rng))

    def t_at(self, level: float, band: tuple[int, int] | None = None) -> Tensor:
        """The timestep below which a share `level` (0 to 1, 1 excluded) of the draws lie."""
        low, count = self._band(band)
        return self.timestep(torch.tensor(low + int(level * count)))

    def timestep(self, index: Int[Tensor, ""]) -> Tensor:
        """What the network is told at training timestep number `index`; all numbers are equally likely."""
        return index

    def _band(self, band: tuple[int, int] | None) -> tuple[int, int]:
        """First number, and how many there are to draw from."""
        low, high = band or (0, self.num_timesteps - 1)
        return low, min(high + 1, self.num_timesteps) - low

    @abstractmethod
    def add_noise(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """Latents at timestep t."""

    @abstractmethod
    def target(
        self, x0: Float[Tensor, "b c h w"], noise: Float[Tensor, "b c h w"], t: Tensor
    ) -> Float[Tensor, "b c h w"]:
        """What the network must answer at timestep t."""

    @abstractmethod
    def snr(self, t: Tensor) -> Float[Tensor, " b"]:
        """Signal-to-noise ratio of variances."""


@dataclass(frozen=True)
class Diffusion(NoiseProcess):
    """Variance-preserving diffusion in discrete time (Ho et al., 2020, arXiv:2006.11239)."""

    alphas_cumprod: Float[Tensor, " t"]
    """Share of the signal's variance that is left at each training timestep."""
    prediction: Prediction = "epsilon"

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> "Diffusion":
        """The process that a model was trained with, from its `scheduler_config.json`, whatever sampler that names.

        Raises:
            ModelError: The configuration has no betas, or the network predicts something else.
        """
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

        prediction = config.get("prediction_type", "epsilon")
        known = ("epsilon", "v_prediction")
        if prediction not in known or not {"beta_start", "trained_betas"} & config.keys():
            raise ModelError(
                f"scheduler_config.json: {config.get('_class_name')} with prediction_type {prediction!r} has no "
                f"training betas; expected a diffusion model that predicts one of {', '.join(known)}"
            )
        scheduler = cast("Any", DDPMScheduler(**{key: config[key] for key in _BETA_KEYS if key in config}))
        return cls(scheduler.alphas_cumprod, prediction)

    def to(self, device: torch.device) -> "Diffusion":
        """The same process with its table on `device`."""
        return Diffusion(self.alphas_cumprod.to(device), self.prediction)

    @property
    def num_timesteps(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
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

    def _amplitudes(self, t: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        signal = self.alphas_cumprod[t].view(-1, 1, 1, 1)
        return signal.sqrt(), (1 - signal).sqrt()
