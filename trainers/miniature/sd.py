"""The family's Stable Diffusion members: an epsilon model in SD 1.5's layout, a v-prediction UNet in SD 2.1's.

The epsilon model starts from the SDXL-layout base (its UNet and its first text encoder), the v-prediction UNet from the
epsilon one, and both are taught by the base; the v-prediction UNet shares the epsilon model's text encoder.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from trainers.miniature.family import BETAS, DOWNSCALE, LATENT_CHANNELS, build_tokenizer
from trainers.miniature.pictures import Pictures, captions
from trainers.miniature.scorers import tokens
from trainers.miniature.teacher import Teacher, time_ids
from trainers.miniature.training import Schedule, train
from trainers.miniature.world import SIZE

_BATCH = 16
_CROSS = ("attn2.to_k.weight", "attn2.to_v.weight")
_MAX_SNR = 5.0  # as in min-SNR
_LAYOUTS: dict[str, dict[str, Any]] = {
    # SD 1.5 projects into and out of attention by 1x1 convolutions, SD 2.1 by linear layers.
    # The v-prediction UNet is smaller by its middle block.
    "epsilon": {"use_linear_projection": False},
    "v_prediction": {"use_linear_projection": True, "mid_block_type": None},
}
_PROCESS = DDPMScheduler(**BETAS, num_train_timesteps=1000)
Prediction = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Latents:
    """The pictures a denoiser trains on, encoded: scaled latents, and the scenes they show."""

    x0: Float[Tensor, "n c h w"]
    pictures: Pictures


@dataclass(frozen=True)
class SdDenoiser:
    """A UNet and the text encoder whose last hidden state it reads."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    prediction: Prediction = "epsilon"

    def embed(self, texts: Sequence[str]) -> Float[Tensor, "b tokens width"]:
        """Prompts as the stock pipeline embeds them."""
        return self.text_encoder(tokens(self.tokenizer, texts)).last_hidden_state


def build_sd_unet(prediction: Prediction, text_width: int) -> UNet2DConditionModel:
    """SD's layout at small size: nothing is added to the time embedding."""
    return UNet2DConditionModel(
        sample_size=SIZE // DOWNSCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96, 160),
        attention_head_dim=cast("Any", (3, 5)),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        norm_num_groups=16,
        **_LAYOUTS[prediction],
    )


@torch.no_grad()
def from_sdxl(teacher: Teacher, ids: Int[Tensor, "b tokens"]) -> SdDenoiser:
    """An epsilon model that starts where the SDXL-layout one ended.

    Its cross-attention keeps what it read from the first text encoder, and what sizes and pooled text added to the time
    embedding becomes a constant: the mean over the prompts `ids`.
    """
    encoder = copy.deepcopy(teacher.text_encoders[0])
    width = encoder.config.hidden_size
    unet = build_sd_unet("epsilon", width)
    given = teacher.unet.state_dict()
    for name, tensor in unet.state_dict().items():
        wanted = given[name][:, :width] if name.endswith(_CROSS) else given[name]
        tensor.copy_(wanted.reshape(tensor.shape))
    sdxl: Any = teacher.unet
    parts = sdxl.add_time_proj(time_ids(len(ids)).flatten()).reshape(len(ids), -1)
    pooled = teacher.text_encoders[1](ids).text_embeds
    added = sdxl.add_embedding(torch.cat([pooled, parts], dim=-1)).mean(0)
    cast("Any", unet).time_embedding.linear_2.bias += added
    _to_last_state(encoder, ids)
    return SdDenoiser(unet, encoder, teacher.tokenizer)


@torch.no_grad()
def from_epsilon(model: SdDenoiser) -> SdDenoiser:
    """A v-prediction model with the text encoder of an epsilon model and all of its UNet that has a place."""
    unet = build_sd_unet("v_prediction", model.text_encoder.config.hidden_size)
    given = model.unet.state_dict()
    for name, tensor in unet.state_dict().items():
        tensor.copy_(given[name].reshape(tensor.shape))
    return SdDenoiser(unet, model.text_encoder, model.tokenizer, "v_prediction")


@torch.no_grad()
def _to_last_state(encoder: CLIPTextModel, ids: Int[Tensor, "b tokens"]) -> None:
    """Make the last hidden state, which SD reads, start close to the penultimate one, which SDXL reads.

    The last layer starts as the identity; the final norm's scale and shift are the penultimate states' own.
    """
    body: Any = encoder
    states = body(ids, output_hidden_states=True).hidden_states[-2].flatten(0, 1)
    for linear in (body.encoder.layers[-1].self_attn.out_proj, body.encoder.layers[-1].mlp.fc2):
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)
    body.final_layer_norm.weight.copy_(states.std(-1).mean().expand(states.shape[-1]))
    body.final_layer_norm.bias.copy_(states.mean().expand(states.shape[-1]))


def train_sd(latents: Latents, denoiser: SdDenoiser, teacher: Teacher, schedule: Schedule) -> None:
    """Predict what the teacher predicts; one caption in ten is empty.

    The text encoder trains along with the epsilon model and stays as it is with the other.
    """
    learns = (denoiser.unet, denoiser.text_encoder) if denoiser.prediction == "epsilon" else (denoiser.unet,)

    def loss(words: random.Random) -> Tensor:
        chosen = torch.randint(len(latents.pictures), (_BATCH,))
        texts = captions(latents.pictures.chosen(chosen), words, empty=0.1)
        x0 = latents.x0[chosen]
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        x_t = _PROCESS.add_noise(x0, noise, cast("Any", t))
        wanted = _target(denoiser.prediction, x_t, teacher.noise(x_t, t, texts), t)
        predicted: Tensor = denoiser.unet(x_t, t, denoiser.embed(texts)).sample
        return (_weight(denoiser.prediction, t) * (predicted - wanted).square().mean(dim=(1, 2, 3))).mean()

    train(f"sd {denoiser.prediction}", learns, loss, schedule)


def denoising_errors(
    denoiser: SdDenoiser, x0: Float[Tensor, "b c h w"], time: float, texts: Sequence[str]
) -> Float[Tensor, " b"]:
    """Mean squared error of what the UNet predicts for each example, at a time in [0, 1]."""
    noise, t = torch.randn_like(x0), torch.full((len(x0),), round(time * 999))
    x_t = _PROCESS.add_noise(x0, noise, cast("Any", t))
    predicted: Tensor = denoiser.unet(x_t, t, denoiser.embed(texts)).sample
    return (predicted - _target(denoiser.prediction, x_t, noise, t)).square().mean(dim=(1, 2, 3))


def _target(prediction: Prediction, x_t: Tensor, noise: Tensor, t: Int[Tensor, " b"]) -> Tensor:
    if prediction == "epsilon":
        return noise
    signal = _PROCESS.alphas_cumprod[t].view(-1, 1, 1, 1)
    return (noise - (1 - signal).sqrt() * x_t) / signal.sqrt()


def _weight(prediction: Prediction, t: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Errors of the predicted picture count by the root of the clamped signal-to-noise ratio.

    Min-SNR weights (Hang et al., 2023, arXiv:2303.09556) have no root. They suit noisy targets; a teacher's are not
    noisy, and colours of large areas are decided where there is hardly any signal.
    """
    signal = _PROCESS.alphas_cumprod[t]
    snr = signal / (1 - signal)
    return snr.clamp(max=_MAX_SNR).sqrt() / (snr if prediction == "epsilon" else snr + 1)


def save_sd(folder: Path, vae: AutoencoderKL, denoiser: SdDenoiser) -> None:
    """Save an SD folder in half precision, with SD 1.5's scheduler."""
    scheduler = PNDMScheduler(**BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=build_tokenizer(),  # a used one would be saved with the last call's padding
        unet=denoiser.unet,
        scheduler=cast("Any", scheduler),
        safety_checker=cast("Any", None),
        feature_extractor=cast("Any", None),
        requires_safety_checker=False,
    )
    pipeline.to(dtype=torch.float16).save_pretrained(folder, safe_serialization=True)


def save_v(folder: Path, unet: UNet2DConditionModel) -> None:
    """Save the v-prediction UNet in half precision, and SD 2.1's scheduler; all else is the epsilon folder's."""
    cast("Any", unet).to(dtype=torch.float16).save_pretrained(folder / "unet")
    scheduler = DDIMScheduler(
        **BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    scheduler.save_pretrained(folder / "scheduler")
