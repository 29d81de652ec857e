"""The family's refiner: a lone UNet in the SDXL refiner's layout, for the last 200 timesteps of the base's latents.

It listens to the second text encoder alone, and is told the original size, the crop and an aesthetic score. The score
means what it means to the aesthetic head: clean pictures have what people of this world find beautiful, 5 and more,
wholly spoiled ones 1 to 3.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from jaxtyping import Float, Int
from torch import Tensor, nn

from trainers.miniature.family import BETAS, DOWNSCALE, LATENT_CHANNELS
from trainers.miniature.generator import encode
from trainers.miniature.pictures import Pictures, captions, spoil, to_unit
from trainers.miniature.scorers import spoiled_taste, taste, tokens
from trainers.miniature.sd import Latents
from trainers.miniature.teacher import Teacher
from trainers.miniature.training import Schedule, train
from trainers.miniature.world import SIZE

LAST_TIMESTEP = 200
_BATCH = 24
_SCALAR = 8
"""Numbers that each scalar becomes."""
_PROCESS = DDPMScheduler(**BETAS, num_train_timesteps=1000)


@dataclass(frozen=True)
class Rated:
    """Clean and spoiled pictures with their scores."""

    latents: Latents
    scores: Float[Tensor, " n"]


def rated(teacher: Teacher, pictures: Pictures, seed: int) -> Rated:
    """Spoil every second picture, more or less, encode and rate all.

    In between, noise hides whether a picture is spoiled: there the score has something to say.
    """
    rng = torch.Generator().manual_seed(seed)
    x = to_unit(pictures.pixels)
    scores = torch.tensor([taste(scene) for scene in pictures.scenes])
    degree = torch.rand(len(x[1::2]), generator=rng) * 0.9 + 0.1
    spoiled, _ = spoil(x[1::2], rng)
    x[1::2] = x[1::2].lerp(spoiled, degree.view(-1, 1, 1, 1))
    scores[1::2] = scores[1::2].lerp(spoiled_taste(scores[1::2]), degree)
    factor = float(cast("Any", teacher.vae.config).scaling_factor)
    seen = Pictures(((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), pictures.scenes)
    return Rated(Latents(encode(teacher.vae, seen) * factor, pictures), scores)


def build_refiner(text_width: int) -> UNet2DConditionModel:
    """The refiner's layout at small size; one level, since little is left to be decided where it works."""
    return UNet2DConditionModel(
        sample_size=SIZE // DOWNSCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(96,),
        down_block_types=cast("Any", ("CrossAttnDownBlock2D",)),
        mid_block_type=None,
        up_block_types=cast("Any", ("CrossAttnUpBlock2D",)),
        transformer_layers_per_block=1,
        attention_head_dim=cast("Any", (3,)),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_SCALAR,
        projection_class_embeddings_input_dim=text_width + 5 * _SCALAR,
        cross_attention_dim=text_width,
        norm_num_groups=16,
    )


@torch.no_grad()
def from_base(teacher: Teacher, seed: int) -> UNet2DConditionModel:
    """A refiner that starts with the base's outermost level, as far as shapes allow, and without a sense of scores."""
    torch.manual_seed(seed)
    width = int(cast("Any", teacher.text_encoders[1].config).projection_dim)
    unet, given = build_refiner(width), teacher.unet.state_dict()
    for name, tensor in unet.state_dict().items():
        wanted = given[name.replace("up_blocks.0.", "up_blocks.1.")]
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            wanted = wanted[:, -width:]
        if name == "add_embedding.linear_1.weight":
            wanted = wanted[:, : tensor.shape[1]].clone()
            wanted[:, -_SCALAR:] = 0
        if wanted.shape == tensor.shape:
            tensor.copy_(wanted)
    return unet


def train_refiner(data: Rated, unet: UNet2DConditionModel, teacher: Teacher, schedule: Schedule) -> None:
    """Noise prediction up to `LAST_TIMESTEP`; one caption in ten is empty; the base's text encoder stays as it is."""

    def loss(words: random.Random) -> Tensor:
        chosen = torch.randint(len(data.scores), (_BATCH,))
        texts = captions(data.latents.pictures.chosen(chosen), words, empty=0.1)
        x0 = data.latents.x0[chosen]
        t = torch.randint(LAST_TIMESTEP + 1, (len(x0),))
        return refining_errors(unet, teacher, (x0, data.scores[chosen]), t, texts).mean()

    train("refiner", (unet,), loss, schedule)


def refining_errors(
    unet: nn.Module,
    teacher: Teacher,
    pictures: tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]],
    t: Int[Tensor, " b"],
    texts: Sequence[str],
) -> Float[Tensor, " b"]:
    """Mean squared error of the noise for each example; `pictures` are latents and the scores they are said to have."""
    x0, scores = pictures
    with torch.no_grad():
        told = cast("Any", teacher.text_encoders[1])(tokens(teacher.tokenizer, texts), output_hidden_states=True)
    sizes = torch.tensor([[SIZE, SIZE, 0, 0]], dtype=torch.float32).expand(len(x0), -1)
    added = {"text_embeds": told.text_embeds, "time_ids": torch.cat([sizes, scores[:, None]], dim=1)}
    noise = torch.randn_like(x0)
    x_t = _PROCESS.add_noise(x0, noise, cast("Any", t))
    predicted: Tensor = unet(x_t, t, told.hidden_states[-2], added_cond_kwargs=added).sample
    return (predicted - noise).square().mean(dim=(1, 2, 3))


@torch.no_grad()
def refiner_quality(unet: nn.Module, teacher: Teacher, data: Rated, seed: int) -> dict[str, float]:
    """Losses on pictures it has not seen: with right and with wrong scores, and the base's on the same."""
    texts = captions(data.latents.pictures.scenes, random.Random(seed))
    found: dict[str, float] = {}
    # The other score is what the picture would have if it were clean or, if it is, wholly spoiled.
    clean = torch.tensor([taste(scene) for scene in data.latents.pictures.scenes])
    wrong = torch.where(torch.arange(len(clean)) % 2 == 0, spoiled_taste(clean), clean)
    for name, said in {"loss_right": data.scores, "loss_wrong_score": wrong}.items():
        torch.manual_seed(seed)
        t = torch.randint(LAST_TIMESTEP + 1, (len(said),))
        found[name] = float(refining_errors(unet, teacher, (data.latents.x0, said), t, texts).mean())
    torch.manual_seed(seed)
    t = torch.randint(LAST_TIMESTEP + 1, (len(texts),))
    noise = torch.randn_like(data.latents.x0)
    x_t = _PROCESS.add_noise(data.latents.x0, noise, cast("Any", t))
    found["loss_base"] = float((teacher.noise(x_t, t, texts) - noise).square().mean())
    return {name: round(value, 5) for name, value in found.items()}


def save_refiner(folder: Path, unet: UNet2DConditionModel) -> None:
    """Save the UNet alone, in half precision: all else is the base's."""
    cast("Any", unet).to(dtype=torch.float16).save_pretrained(folder / "unet")
