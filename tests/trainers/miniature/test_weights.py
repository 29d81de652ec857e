"""The members that ship, on scenes that none has seen."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel, UNet2DConditionModel
from transformers import Gemma2Model

from trainers.miniature import recipe
from trainers.miniature.checks import load
from trainers.miniature.generator import encode
from trainers.miniature.pictures import plain, to_unit
from trainers.miniature.quality import listening
from trainers.miniature.refiner import rated, refiner_quality
from trainers.miniature.sana import SanaDenoiser, build_gemma_tokenizer
from trainers.miniature.sana_training import velocity_errors
from trainers.miniature.teacher import Teacher

WEIGHTS = Path(recipe.__file__).parent / "weights"


@pytest.fixture(scope="module")
def pictures():
    return plain(24, seed=77)


@pytest.fixture(scope="module")
def teacher():
    return Teacher.load(WEIGHTS)


@pytest.fixture(scope="module")
def x0(teacher, pictures):
    with torch.no_grad():
        return encode(teacher.vae, pictures) * teacher.vae.config.scaling_factor


def test_sana_listens(x0, pictures):
    parts = load(WEIGHTS / "sana", transformer=SanaTransformer2DModel, text_encoder=Gemma2Model)
    model = SanaDenoiser(parts["transformer"], parts["text_encoder"], build_gemma_tokenizer())
    heard = listening(lambda rows, time, texts: velocity_errors(model, x0[rows], time, texts), pictures)
    assert heard.right < heard.empty < heard.wrong
    assert heard.wrong > 2 * heard.right


@torch.no_grad()
def test_sanas_autoencoder_has_the_latents_of_the_base_and_gives_pictures_back(x0, pictures):
    vae = load(WEIGHTS / "sana", vae=AutoencoderDC)["vae"]
    x = to_unit(pictures.pixels)
    latents = vae.encode(x).latent
    assert (latents * vae.config.scaling_factor - x0).square().mean() < 0.02 * x0.var()
    assert (vae.decode(latents).sample - x).abs().mean() * 127.5 < 10


def test_the_refiner_is_better_than_the_base_where_it_works(teacher, pictures):
    unet = load(WEIGHTS / "refiner", unet=UNet2DConditionModel)["unet"]
    found = refiner_quality(unet, teacher, rated(teacher, pictures, seed=5), seed=0)
    assert found["loss_right"] < 0.85 * found["loss_base"]
    assert found["loss_right"] < found["loss_wrong_score"]
