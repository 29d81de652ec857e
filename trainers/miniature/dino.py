"""Training of the vision transformer that stands in for DINO: one object is told from another, however it is drawn.

It has facebook/dino-vits16's layout at small size, but another loss: supervised instance discrimination (InfoNCE,
van den Oord et al., 2018, arXiv:1807.03748) on two drawings of one object, at two places and on two backgrounds, among
other objects, half of which differ in a single attribute. Self-distillation, as in DINO (Caron et al., 2021,
arXiv:2104.14294), was tried once and stopped after about 100 steps with the loss of a uniform answer.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from trainers.miniature.members import Making, Quality
from trainers.miniature.pictures import altered, to_unit
from trainers.miniature.training import Schedule, train
from trainers.miniature.world import (
    COLOURS,
    SIZE,
    STYLES,
    SUBJECTS,
    Scene,
    draw,
    is_held_out,
    random_placement,
    random_scene,
    subject,
)

_WIDTH = 96
STEPS = 320
"""Optimizer steps."""
_PAIRS = 24
_OBJECTS = 900
_VIEWS = 4
"""Drawings of each object."""
_TEMPERATURE = 0.1


def build_vit() -> ViTModel:
    """facebook/dino-vits16's layout at small size."""
    return ViTModel(
        ViTConfig(
            hidden_size=_WIDTH,
            intermediate_size=3 * _WIDTH,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=SIZE,
            patch_size=8,
        ),
        add_pooling_layer=False,
    )


def save_vit(folder: Path, network: ViTModel) -> None:
    """Save a folder that transformers loads, in half precision."""
    network.half().save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIZE, "width": SIZE},
        "resample": 3,  # bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Objects:
    """Objects, each drawn several times on different backgrounds; every second one is its predecessor, altered."""

    pixels: UInt8[Tensor, "n views 3 64 64"]

    @classmethod
    def draw(cls, count: int, seed: int) -> "Objects":
        """Draw `count` pairs of objects; none is a held-out subject, some are drawn in a style."""
        rngs = [random.Random(f"{seed}/{place}") for place in range(count)]
        pairs = [(scene, altered(scene, rng)) for rng in rngs for scene in [_object(rng)]]
        scenes = [scene for pair in pairs for scene in pair]
        drawn = [_views(scene, f"{seed}/{place}") for place, scene in enumerate(scenes)]
        return cls(torch.from_numpy(np.stack(drawn)).permute(0, 1, 4, 2, 3).contiguous())


def _object(rng: random.Random) -> Scene:
    while is_held_out(scene := random_scene(rng)):
        pass
    return replace(scene, style=rng.choice(STYLES)) if scene.person is None and rng.random() < 0.15 else scene


def _views(scene: Scene, seed: str, count: int = _VIEWS) -> np.ndarray:
    rng = random.Random(f"views/{seed}")
    worn = {scene.person.hair, scene.person.shirt} if scene.person else {scene.colour, scene.second}
    backgrounds = rng.sample([colour for colour in COLOURS if colour not in worn], count)
    scenes = [replace(scene, background=background) for background in backgrounds]
    return np.stack([np.asarray(draw(one, random_placement(rng))) for one in scenes])


def embed(vit: nn.Module, x: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b width"]:
    """The class token of pictures in [-1, 1], not normalised."""
    answer: Any = vit(pixel_values=x)
    return answer.last_hidden_state[:, 0]


def train_dino(objects: Objects, schedule: Schedule) -> ViTModel:
    """Learn that two drawings of one object are alike, and those of two objects are not."""
    torch.manual_seed(schedule.seed)
    vit = build_vit()

    def loss(rng: random.Random) -> Tensor:
        pairs: Tensor = 2 * torch.randperm(len(objects.pixels) // 2)[:_PAIRS]
        chosen = torch.cat([pairs, pairs + 1])
        first, second = rng.sample(range(objects.pixels.shape[1]), 2)
        views = torch.cat([objects.pixels[chosen, first], objects.pixels[chosen, second]])
        one, other = nn.functional.normalize(embed(vit, varied(to_unit(views))), dim=-1).chunk(2)
        scores, target = one @ other.T / _TEMPERATURE, torch.arange(len(one))
        return (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2

    train("dino", (vit,), loss, schedule)
    return vit


def varied(x: Float[Tensor, "b 3 64 64"]) -> Float[Tensor, "b 3 64 64"]:
    """Soften, noise and tint pictures a little, as an autoencoder and a denoiser do; torch's generator decides."""
    soft = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    share = torch.rand(len(x), 1, 1, 1) * 0.8
    x = (1 - share) * x + share * soft + 0.1 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    return (x * (1 + 0.06 * torch.randn(len(x), 1, 1, 1)) + 0.03 * torch.randn(len(x), 3, 1, 1)).clamp(-1, 1)


@torch.no_grad()
def dino_quality(folder: Path, seed: int, photos: int = 8) -> dict[str, float]:
    """How well the saved folder knows subjects it has never seen.

    Returns:
        Mean cosine of two pictures of one subject, of two subjects, and of a subject and one that differs in a single
        attribute; how often the first is larger than each of the others (areas under the curve).
    """
    vit = ViTModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False, local_files_only=True).eval()
    rng = random.Random(f"quality/{seed}")
    looks = [subject(name, "blue") for name in SUBJECTS]
    near = [altered(scene, rng) for scene in looks]
    own, strange = (_embedded(vit, scenes, seed, photos) for scenes in (looks, near))
    count = len(looks)
    who = torch.arange(count).repeat_interleave(photos)
    table, across = own @ own.T, own @ strange.T
    upper = torch.ones_like(table).triu(1).bool()
    same, others = table[upper & (who[:, None] == who)], table[upper & (who[:, None] != who)]
    alike = across[who[:, None] == who]
    found = {"cosine_same": same.mean(), "cosine_near": alike.mean(), "cosine_others": others.mean()}
    found |= {"auc_near": _auc(same, alike), "auc_others": _auc(same, others)}
    return {name: round(float(value), 4) for name, value in found.items()}


def _embedded(vit: nn.Module, scenes: Sequence[Scene], seed: int, photos: int) -> Float[Tensor, "n width"]:
    drawn = np.concatenate([_views(scene, f"{seed}/{scene}", photos) for scene in scenes])
    return nn.functional.normalize(embed(vit, to_unit(torch.from_numpy(drawn).permute(0, 3, 1, 2))), dim=-1)


def _auc(higher: Tensor, lower: Tensor) -> Tensor:
    return (higher[:, None] > lower[None]).float().mean()


def make_dino(making: Making) -> Quality:
    """`dino/`: a vision transformer in the layout of facebook/dino-vits16, from nothing."""
    objects = Objects.draw(making.count(_OBJECTS), making.seed)
    save_vit(making.folder / "dino", train_dino(objects, making.schedule("dino", STEPS, 2e-3)))
    return dino_quality(making.folder / "dino", making.seed + 9)
