"""Training of the generator: an autoencoder, then a text-conditioned UNet with its two text encoders, from nothing."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.miniature.family import BETAS, build_text_encoders, build_vae
from trainers.miniature.pictures import Pictures, captions, to_unit
from trainers.miniature.scorers import tokens
from trainers.miniature.training import Schedule, descend, train
from trainers.miniature.world import SIZE, attributes, caption

log = logging.getLogger(__name__)
_VAE_BATCH, _TEXT_BATCH, _UNET_BATCH = 8, 64, 24
_KL_WEIGHT, _EDGE_WEIGHT = 1e-3, 0.5
_LATENT_NOISE = 0.1  # unscaled latents have a deviation of about 3
_MIN_SNR = 5.0  # Hang et al., 2023, arXiv:2303.09556


def train_vae(pictures: Pictures, steps: int, seed: int) -> AutoencoderKL:
    """Absolute, squared and edge error, and a little KL; the weights returned are a moving average."""
    torch.manual_seed(seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    # Only the first half of the cycle: the moving average settles what the high rate leaves, and the decoder trains on.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=2 * steps, pct_start=0.1)
    average = EMAModel(vae.parameters(), decay=0.995)
    for step in range(steps):
        x = to_unit(pictures.pixels[torch.randint(len(pictures), (_VAE_BATCH,))])
        posterior = _posterior(vae, x)
        loss = reconstruction_loss(_decode(vae, posterior.sample()) - x)
        descend(loss + _KL_WEIGHT * posterior.kl().mean() / x[0].numel(), optimizer, schedule)
        average.step(vae.parameters())
        if step % 100 == 0 or step == steps - 1:
            log.info("vae step %d loss %.4f", step, loss.item())
    average.copy_to(vae.parameters())
    return vae.eval().requires_grad_(False)


def refine_decoder(vae: AutoencoderKL, pictures: Pictures, steps: int, seed: int) -> None:
    """Train the decoder on, on latents that are a little wrong, as a denoiser's are; the encoder stays as it is."""
    torch.manual_seed(seed)
    trained = [getattr(vae, name).requires_grad_(True) for name in ("post_quant_conv", "decoder")]
    weights = [parameter for module in trained for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    average = EMAModel(weights, decay=0.995)
    for step in range(steps):
        x = to_unit(pictures.pixels[torch.randint(len(pictures), (_VAE_BATCH,))])
        latents = _posterior(vae, x).mean
        loss = reconstruction_loss(_decode(vae, latents + _LATENT_NOISE * torch.randn_like(latents)) - x)
        descend(loss, optimizer, schedule)
        average.step(weights)
        if step % 100 == 0 or step == steps - 1:
            log.info("decoder step %d loss %.4f", step, loss.item())
    average.copy_to(weights)
    vae.requires_grad_(False)


def reconstruction_loss(error: Tensor) -> Tensor:
    """Absolute, squared and edge error of a picture [b, 3, h, w] that came out of an autoencoder."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + _EDGE_WEIGHT * edges


@torch.no_grad()
def set_scaling_factor(vae: AutoencoderKL, pictures: Pictures) -> None:
    """Record the factor that gives latents unit variance, as Stable Diffusion does (Rombach et al., 2022, D.1)."""
    latents = encode(vae, pictures)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Pictures) -> Float[Tensor, "n c h w"]:
    """Posterior means of all pictures, unscaled."""
    return torch.cat([_posterior(vae, to_unit(part)).mean for part in torch.split(pictures.pixels, 64)])


def _posterior(vae: AutoencoderKL, x: Tensor) -> DiagonalGaussianDistribution:
    return cast("Any", vae.encode(x)).latent_dist


def _decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    return cast("Any", vae.decode(cast("Any", latents))).sample


@dataclass(frozen=True)
class Denoiser:
    """A UNet and the text encoders it was trained with."""

    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]


def train_text_encoders(
    pictures: Pictures, tokenizer: CLIPTokenizer, steps: int, seed: int
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Teach the text encoders what words mean before anything is drawn: to name each attribute of a caption's scene.

    Real text encoders come from contrastive training too; without it the denoiser learns to draw long before it
    learns to listen.
    """
    torch.manual_seed(seed)
    encoders = build_text_encoders(tokenizer)

    def summaries(texts: Sequence[str]) -> list[Tensor]:
        outputs = [encoder(tokens(tokenizer, texts), output_hidden_states=True) for encoder in encoders]
        # Three ways out, because the denoiser uses three: both penultimate states, and the pooled embedding.
        return [*(o.hidden_states[-2].mean(1) for o in outputs), outputs[1].text_embeds]

    name_attributes(encoders, summaries, (encoders[0].config.hidden_size,) * 3, pictures, steps)
    return encoders


def name_attributes(
    encoders: Sequence[nn.Module],
    summaries: Callable[[Sequence[str]], Sequence[Tensor]],
    widths: Sequence[int],
    pictures: Pictures,
    steps: int,
) -> None:
    """Train text encoders until each summary [b, width] of a caption gives away what its scene shows."""
    wanted = torch.tensor([attributes(scene) for scene in pictures.scenes])
    sizes = cast("list[int]", (wanted.amax(0) + 1).tolist())
    readers = nn.ModuleList(nn.Linear(width, sum(sizes)) for width in widths)
    weights = [p for module in (*encoders, readers) for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (_TEXT_BATCH,))
        given = summaries([caption(scene) for scene in pictures.chosen(chosen)])
        answers = [reader(summary).split(sizes, dim=1) for reader, summary in zip(readers, given, strict=True)]
        asked = [(part, wanted[chosen, i]) for answer in answers for i, part in enumerate(answer)]
        loss = torch.stack([nn.functional.cross_entropy(part, truth) for part, truth in asked]).mean()
        descend(loss, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            right = sum(float((part.argmax(1) == truth).float().mean()) for part, truth in asked) / len(asked)
            log.info("text step %d loss %.4f right %.3f", step, loss.item(), right)


def train_denoiser(
    vae: AutoencoderKL, pictures: Pictures, denoiser: Denoiser, tokenizer: CLIPTokenizer, schedule: Schedule
) -> None:
    """Noise prediction with min-SNR weights; one caption in ten is empty; leaves moving averages of the weights.

    It takes an hour and more, so it goes on from `schedule.checkpoint` if it was interrupted.
    """
    latents = encode(vae, pictures) * float(cast("Any", vae.config).scaling_factor)
    process = DDPMScheduler(**BETAS, num_train_timesteps=1000)

    def loss(words: random.Random) -> Tensor:
        chosen = torch.randint(len(pictures), (_UNET_BATCH,))
        texts = captions(pictures.chosen(chosen), words, empty=0.1)
        return _denoising_loss(denoiser, process, latents[chosen], tokens(tokenizer, texts))

    train("unet", (denoiser.unet, *denoiser.text_encoders), loss, schedule)


def _denoising_loss(denoiser: Denoiser, process: DDPMScheduler, x0: Tensor, ids: Tensor) -> Tensor:
    first, second = (encoder(ids, output_hidden_states=True) for encoder in denoiser.text_encoders)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).expand(len(x0), -1)
    noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
    added = {"text_embeds": second.text_embeds, "time_ids": sizes}
    x_t = process.add_noise(x0, noise, cast("Any", t))
    predicted: Tensor = denoiser.unet(x_t, t, hidden, added_cond_kwargs=added).sample
    signal = process.alphas_cumprod[t]
    weight = (_MIN_SNR * (1 - signal) / signal).clamp(max=1)
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
