"""The denoising loss that all methods share: what is drawn for each row of a batch, and how errors are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from trainers.batch import Stream, example_rng

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import Backbone
    from trainers.batch import Batch
    from trainers.frozen import Images
    from trainers.loss import LossConfig


@dataclass(frozen=True)
class Noised:
    """A batch on its way to noise."""

    x0: Float[Tensor, "b c h w"]
    noise: Float[Tensor, "b c h w"]
    t: Tensor
    """Training timesteps, as the denoiser is told them."""
    x_t: Float[Tensor, "b c h w"]
    target: Float[Tensor, "b c h w"]
    """What the denoiser should answer."""


class Denoising:
    """Noise for a batch of pictures, and the loss of a prediction; a function of seed, step and place in the batch."""

    def __init__(self, backbone: Backbone, images: Images, loss: LossConfig, seed: int) -> None:
        self._backbone, self._images, self._loss, self._seed = backbone, images, loss, seed

    def rngs(self, batch: Batch, stream: Stream) -> list[torch.Generator]:
        """Each row's random numbers for one purpose, on the CPU."""
        return [example_rng(self._seed, batch.step, place, stream) for place in batch.places]

    def noised(self, batch: Batch) -> Noised:
        """Draw latents, noise and timesteps."""
        backbone, process = self._backbone, self._backbone.process
        moments = self._images.select(batch.indices, backbone.device)
        shape = moments.mean.shape[1:]

        def normal(stream: Stream, shape: torch.Size) -> Tensor:
            drawn = [torch.randn(shape, generator=rng) for rng in self.rngs(batch, stream)]
            return torch.stack(drawn).to(backbone.device, non_blocking=True)

        x0 = backbone.sample_latents(moments, normal(Stream.VAE, shape))
        noise = normal(Stream.NOISE, shape)
        if self._loss.noise_offset:
            noise = noise + self._loss.noise_offset * normal(Stream.OFFSET, torch.Size((shape[0], 1, 1)))
        t = torch.stack(self._timesteps(batch)).to(backbone.device, non_blocking=True)
        return Noised(x0, noise, t, process.add_noise(x0, noise, t), process.target(x0, noise, t))

    def _timesteps(self, batch: Batch) -> list[Tensor]:
        process, band = self._backbone.process, self._loss.timesteps
        if batch.levels is not None:
            return [process.t_at(level, band) for level in batch.levels]
        return [process.draw_t(rng, band) for rng in self.rngs(batch, Stream.TIMESTEP)]

    def kept(self, batch: Batch, dropout: float) -> list[bool]:
        """Which rows keep something that training drops with probability `dropout`; all do in validation."""
        drawn = [float(torch.rand((), generator=rng)) for rng in self.rngs(batch, Stream.DROPOUT)]
        return [batch.levels is not None or value >= dropout for value in drawn]

    def losses(self, prediction: Float[Tensor, "b c h w"], noised: Noised) -> Float[Tensor, " b"]:
        """Each row's mean squared error, weighted by its signal-to-noise ratio as the study says."""
        return self.weigh((prediction.float() - noised.target).square().mean(dim=(1, 2, 3)), noised)

    def weigh(self, losses: Float[Tensor, " b"], noised: Noised) -> Float[Tensor, " b"]:
        """Apply the study's weighting to each row's loss."""
        process = self._backbone.process
        return losses * self._loss.weighting.weights(process.snr(noised.t), process.prediction)
