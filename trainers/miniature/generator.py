"""Training of the generator: an autoencoder, then a text-conditioned UNet with its two text encoders, from nothing."""

import logging
import random
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from trainers.miniature.family import BETAS, build_text_encoders, build_unet, build_vae
from trainers.miniature.pictures import Pictures, captions, to_unit
from trainers.miniature.scorers import tokens
from trainers.miniature.world import SIZE

log = logging.getLogger(__name__)
_VAE_BATCH, _UNET_BATCH = 8, 32
_KL_WEIGHT, _EDGE_WEIGHT = 1e-3, 0.5
_LATENT_NOISE = 0.1  # unscaled latents have a deviation of about 3
_MIN_SNR = 5.0  # Hang et al., 2023, arXiv:2303.09556


def train_vae(pictures: Pictures, steps: int, seed: int) -> AutoencoderKL:
    """Absolute, squared and edge error, and a little KL; the weights returned are a moving average."""
    torch.manual_seed(seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=2 * steps, pct_start=0.1)
    average = EMAModel(vae.parameters(), decay=0.995)
    for step in range(steps):
        x = to_unit(pictures.pixels[torch.randint(len(pictures), (_VAE_BATCH,))])
        posterior = vae.encode(x).latent_dist
        loss = _reconstruction_loss(vae.decode(posterior.sample()).sample - x)
        _step(loss + _KL_WEIGHT * posterior.kl().mean() / x[0].numel(), optimizer, schedule)
        average.step(vae.parameters())
        if step % 100 == 0 or step == steps - 1:
            log.info("vae step %d loss %.4f", step, loss.item())
    average.copy_to(vae.parameters())
    return vae.eval().requires_grad_(False)


def refine_decoder(vae: AutoencoderKL, pictures: Pictures, steps: int, seed: int) -> None:
    """Train the decoder on, on latents that are a little wrong, as a denoiser's are; the encoder stays as it is."""
    torch.manual_seed(seed)
    weights = [*vae.decoder.requires_grad_(True).parameters(), *vae.post_quant_conv.requires_grad_(True).parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    average = EMAModel(weights, decay=0.995)
    for step in range(steps):
        x = to_unit(pictures.pixels[torch.randint(len(pictures), (_VAE_BATCH,))])
        latents = vae.encode(x).latent_dist.mean
        loss = _reconstruction_loss(vae.decode(latents + _LATENT_NOISE * torch.randn_like(latents)).sample - x)
        _step(loss, optimizer, schedule)
        average.step(weights)
        if step % 100 == 0 or step == steps - 1:
            log.info("decoder step %d loss %.4f", step, loss.item())
    average.copy_to(weights)
    vae.requires_grad_(False)


def _reconstruction_loss(error: Tensor) -> Tensor:
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
    return torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in pictures.pixels.split(64)])


@dataclass(frozen=True)
class Denoiser:
    """A UNet and the text encoders it was trained with."""

    unet: UNet2DConditionModel
    text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]


def train_denoiser(vae: AutoencoderKL, pictures: Pictures, tokenizer: CLIPTokenizer, steps: int, seed: int) -> Denoiser:
    """Noise prediction with min-SNR weights; one caption in ten is empty; returns moving averages of the weights."""
    latents = encode(vae, pictures) * vae.config.scaling_factor
    torch.manual_seed(seed)
    words = random.Random(seed)
    denoiser = Denoiser(build_unet(), build_text_encoders(tokenizer))
    weights = [p for module in (denoiser.unet, *denoiser.text_encoders) for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    average = EMAModel(weights, decay=0.999)
    process = DDPMScheduler(**BETAS, num_train_timesteps=1000)
    for step in range(steps):
        chosen = torch.randint(len(pictures), (_UNET_BATCH,))
        texts = captions([pictures.scenes[i] for i in chosen.tolist()], words, empty=0.1)
        loss = _denoising_loss(denoiser, process, latents[chosen], tokens(tokenizer, texts))
        _step(loss, optimizer, schedule)
        average.step(weights)
        if step % 100 == 0 or step == steps - 1:
            log.info("unet step %d loss %.4f", step, loss.item())
    average.copy_to(weights)
    for module in (denoiser.unet, *denoiser.text_encoders):
        module.eval().requires_grad_(False)
    return denoiser


def _denoising_loss(denoiser: Denoiser, process: DDPMScheduler, x0: Tensor, ids: Tensor) -> Tensor:
    first, second = (encoder(ids, output_hidden_states=True) for encoder in denoiser.text_encoders)
    hidden = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    sizes = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]], dtype=torch.float32).expand(len(x0), -1)
    noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
    added = {"text_embeds": second.text_embeds, "time_ids": sizes}
    predicted = denoiser.unet(process.add_noise(x0, noise, t), t, hidden, added_cond_kwargs=added).sample
    snr = compute_snr(process, t)
    weight = snr.clamp(max=_MIN_SNR) / snr
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    schedule.step()
