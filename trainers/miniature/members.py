"""The stages of the recipe that make members of the family from the SDXL-layout base, one function each.

Every function reads `folder`/sdxl (and what else it names), writes its own part of `folder`, and returns how good that
is on scenes it has not seen.
"""

import copy
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from transformers import CLIPTextModel

from trainers.faces.miniature import load_network, save_network
from trainers.miniature import checks, faces, portraits, refiner, sana, sana_training, sd
from trainers.miniature.generator import encode
from trainers.miniature.photomaker import photomaker_quality, train_photomaker
from trainers.miniature.pictures import Pictures, plain, wide
from trainers.miniature.scorers import tokens
from trainers.miniature.teacher import Teacher
from trainers.miniature.training import Schedule
from trainers.miniature.world import caption

log = logging.getLogger(__name__)
STEPS = {
    "sd": 700,
    "sd_v": 600,
    "gemma": 400,
    "dc_ae": 1500,
    "sana": 4500,
    "refiner": 400,
    "face": 400,
    "photomaker": 500,
}
"""Optimizer steps of each network."""
_PICTURES = 6000
_PEOPLE, _PHOTOS = 160, 6
_CHECKED = 32
Quality = dict[str, float]


@dataclass(frozen=True)
class Making:
    """Where a member is made, from which seed, and which share of the pictures and steps it gets."""

    folder: Path
    seed: int
    fraction: float

    def count(self, whole: int) -> int:
        """That share of a number, and never next to nothing."""
        return max(4, round(whole * self.fraction))

    def schedule(self, name: str, steps: int, rate: float) -> Schedule:
        """The schedule of one network, with its state beside what is made."""
        return Schedule(self.count(steps), self.seed, self.folder / f"{name}.ckpt", rate)

    def pictures(self, whole: int = _PICTURES) -> Pictures:
        """Pictures to train on."""
        return plain(self.count(whole), self.seed)

    def unseen(self) -> Pictures:
        """Pictures to check on."""
        return plain(self.count(2 * _CHECKED), self.seed + 9)


def _latents(teacher: Teacher, pictures: Pictures) -> sd.Latents:
    factor = float(cast("Any", teacher.vae.config).scaling_factor)
    return sd.Latents(encode(teacher.vae, pictures) * factor, pictures)


def make_sd(making: Making) -> Quality:
    """`sd/`: an epsilon model in SD 1.5's layout, taught by the base that it starts from."""
    teacher = Teacher.load(making.folder)
    latents = _latents(teacher, making.pictures())
    texts = [caption(scene) for scene in latents.pictures.scenes[:256]]
    torch.manual_seed(making.seed)
    denoiser = sd.from_sdxl(teacher, tokens(teacher.tokenizer, texts))
    sd.train_sd(latents, denoiser, teacher, making.schedule("sd", STEPS["sd"], 4e-4))
    sd.save_sd(making.folder / "sd", copy.deepcopy(teacher.vae), denoiser)
    return checks.check_sd(making.folder, _latents(teacher, making.unseen()), making.count(_CHECKED))


def make_sd_v(making: Making) -> Quality:
    """`sd_v/`: a v-prediction UNet and SD 2.1's scheduler, from `sd/`, whose other components go with it."""
    teacher = Teacher.load(making.folder)
    networks = checks.load(making.folder / "sd", unet=UNet2DConditionModel, text_encoder=CLIPTextModel)
    start = sd.SdDenoiser(networks["unet"], networks["text_encoder"], teacher.tokenizer)
    torch.manual_seed(making.seed)
    denoiser = sd.from_epsilon(start)
    latents = _latents(teacher, making.pictures())
    sd.train_sd(latents, denoiser, teacher, making.schedule("sd_v", STEPS["sd_v"], 6e-4))
    sd.save_v(making.folder / "sd_v", denoiser.unet)
    return checks.check_v(making.folder, _latents(teacher, making.unseen()), making.count(_CHECKED))


def make_sana(making: Making) -> Quality:
    """`sana/`: a flow model in SANA's layout, taught by the base; its autoencoder has the base's latents."""
    teacher = Teacher.load(making.folder)
    pictures, strange = making.pictures(), wide(making.count(_PICTURES // 2), making.seed + 1)
    half = len(pictures) // 2
    shown = Pictures(torch.cat([pictures.pixels[:half], strange.pixels]), (*pictures.scenes[:half], *strange.scenes))
    vae = sana_training.train_dc_ae(teacher, shown, making.schedule("dc_ae", STEPS["dc_ae"], 2e-3))
    denoiser = sana_training.build_listener(pictures, making.count(STEPS["gemma"]), making.seed)
    latents = _latents(teacher, pictures)
    sana_training.train_sana(latents, denoiser, teacher, making.schedule("sana", STEPS["sana"], 2e-3))
    sana.save_sana(making.folder / "sana", vae, denoiser)
    return checks.check_sana(making.folder, _latents(teacher, making.unseen()), making.count(_CHECKED))


def make_refiner(making: Making) -> Quality:
    """`refiner/`: a lone UNet in the SDXL refiner's layout, from the base's outermost level."""
    teacher = Teacher.load(making.folder)
    data = refiner.rated(teacher, making.pictures(1600), making.seed)
    unet = refiner.from_base(teacher, making.seed)
    refiner.train_refiner(data, unet, teacher, making.schedule("refiner", STEPS["refiner"], 1.5e-3))
    refiner.save_refiner(making.folder / "refiner", unet)
    saved = checks.load(making.folder / "refiner", unet=UNet2DConditionModel)["unet"]
    unseen = refiner.rated(teacher, making.unseen(), making.seed + 9)
    return refiner.refiner_quality(saved, teacher, unseen, making.seed)


def make_face(making: Making) -> Quality:
    """`face/`: a face embedder; the only member that needs no other."""
    album = faces.Album.draw(making.count(_PEOPLE), _PHOTOS, making.seed, making.pictures())
    unseen = faces.Album.draw(making.count(60), 4, making.seed + 1, making.unseen())
    save_network(making.folder / "face", faces.train_face(album, making.schedule("face", STEPS["face"], 2e-3)))
    return faces.face_quality(load_network(making.folder / "face"), unseen)


def make_photomaker(making: Making) -> Quality:
    """`photomaker.safetensors`: PhotoMaker v2's layout, from `sdxl/` and `face/`."""
    people = making.folder / "people"
    portraits.save_people(people, portraits.crowd(making.count(_PEOPLE), making.seed + 2), _PHOTOS, making.seed)
    path = making.folder / "photomaker.safetensors"
    train_photomaker(making.folder, people, path, making.count(STEPS["photomaker"]), making.seed)
    found = photomaker_quality(making.folder, path, making.count(2 * _CHECKED), making.seed + 100)
    for left in (people, path.with_suffix(".work")):
        shutil.rmtree(left)
    return found
