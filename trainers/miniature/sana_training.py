"""Training of the family's SANA member: Gemma learns what words mean, an autoencoder, then the transformer."""

import random
from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float
from torch import Tensor

from trainers.miniature.family import BETAS
from trainers.miniature.generator import encode, name_attributes, reconstruction_loss
from trainers.miniature.pictures import Pictures, captions, to_unit
from trainers.miniature.sana import (
    SHIFT,
    SanaDenoiser,
    build_dc_ae,
    build_gemma,
    build_gemma_tokenizer,
    build_transformer,
)
from trainers.miniature.sd import Latents
from trainers.miniature.teacher import Teacher
from trainers.miniature.training import Schedule, train

_BATCH, _VAE_BATCH = 16, 8
_LENGTH = 32
"""Tokens of a prompt in training; the longest caption has 25."""
_LATENT_NOISE = 0.1  # what a denoiser leaves; unscaled latents have a deviation of about 3
_LIKENESS = 2.0
"""Weight of the distance from the teacher's latents, whose variance is one."""
_SIGNALS = DDPMScheduler(**BETAS, num_train_timesteps=1000).alphas_cumprod


def train_dc_ae(teacher: Teacher, pictures: Pictures, schedule: Schedule) -> AutoencoderDC:
    """Reconstruct pictures by way of the latents that the teacher's autoencoder gives them."""
    torch.manual_seed(schedule.seed)
    factor = float(cast("Any", teacher.vae.config).scaling_factor)
    vae = build_dc_ae(factor)
    wanted = encode(teacher.vae, pictures)

    def loss(_words: random.Random) -> Tensor:
        chosen = torch.randint(len(pictures), (_VAE_BATCH,))
        x = to_unit(pictures.pixels[chosen])
        latents = cast("Any", vae.encode(x)).latent
        likeness = ((latents - wanted[chosen]) * factor).square().mean()
        noisy = latents + _LATENT_NOISE * torch.randn_like(latents)
        return reconstruction_loss(cast("Any", vae.decode(noisy)).sample - x) + _LIKENESS * likeness

    train("dc-ae", (vae,), loss, schedule)
    return vae


def build_listener(pictures: Pictures, steps: int, seed: int) -> SanaDenoiser:
    """An untrained transformer with a Gemma that can name what captions say."""
    torch.manual_seed(seed)
    tokenizer = build_gemma_tokenizer()
    gemma = build_gemma(tokenizer)
    denoiser = SanaDenoiser(build_transformer(), gemma, tokenizer)

    def summaries(texts: Sequence[str]) -> list[Tensor]:
        found = denoiser.embed(texts, _LENGTH)
        mask = found.mask[..., None]
        return [(found.hidden * mask).sum(1) / mask.sum(1)]

    name_attributes((gemma,), summaries, (cast("Any", gemma.config).hidden_size,), pictures, steps)
    return denoiser


def train_sana(latents: Latents, denoiser: SanaDenoiser, teacher: Teacher, schedule: Schedule) -> None:
    """Predict the velocity that the teacher sees, at noise levels as SANA draws them; one caption in ten is empty."""

    def loss(words: random.Random) -> Tensor:
        chosen = torch.randint(len(latents.pictures), (_BATCH,))
        texts = captions(latents.pictures.chosen(chosen), words, empty=0.1)
        x0 = latents.x0[chosen]
        noise, sigma = torch.randn_like(x0), torch.randn(len(x0)).sigmoid()
        sigma = SHIFT * sigma / (1 + (SHIFT - 1) * sigma)
        wanted = seen_velocity(teacher, x0, noise, sigma, texts)
        level = sigma.view(-1, 1, 1, 1)
        predicted = denoiser.velocity((1 - level) * x0 + level * noise, sigma, denoiser.embed(texts, _LENGTH))
        return (predicted - wanted).square().mean()

    train("sana", (denoiser.transformer, denoiser.text_encoder), loss, schedule)


def seen_velocity(
    teacher: Teacher,
    x0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    sigma: Float[Tensor, " b"],
    texts: Sequence[str],
) -> Float[Tensor, "b c h w"]:
    """The velocity noise - x0 as the teacher, a noise predictor on another path, sees it.

    A point on the straight path, divided by the root of sigma^2 + (1 - sigma)^2, lies on the teacher's path at the
    timestep with the same ratio of noise and picture. Below the teacher's first timestep the true velocity is used.
    """
    level = sigma.view(-1, 1, 1, 1)
    x_t = (1 - level) * x0 + level * noise
    size = ((1 - level).square() + level.square()).sqrt()
    signal = ((1 - level) / size).square().flatten()
    t = (_SIGNALS[None] > signal[:, None]).sum(1).clamp(max=len(_SIGNALS) - 1)
    found = _SIGNALS[t].view(-1, 1, 1, 1)
    x = x_t / size
    picture = (x - (1 - found).sqrt() * teacher.noise(x, t, texts)) / found.sqrt()
    return torch.where(level < _first_level(), noise - x0, (x_t - picture) / level.clamp(min=1e-3))


def _first_level() -> float:
    """The flow's noise level at the teacher's first timestep."""
    ratio = float((1 / _SIGNALS[0] - 1).sqrt())
    return ratio / (1 + ratio)


def velocity_errors(
    denoiser: SanaDenoiser, x0: Float[Tensor, "b c h w"], time: float, texts: Sequence[str]
) -> Float[Tensor, " b"]:
    """Mean squared error of the velocity for each example, at a noise level."""
    noise, sigma = torch.randn_like(x0), torch.full((len(x0),), time)
    predicted = denoiser.velocity((1 - time) * x0 + time * noise, sigma, denoiser.embed(texts))
    return (predicted - (noise - x0)).square().mean(dim=(1, 2, 3))
