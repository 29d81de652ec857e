"""Training data of the miniature family: many pictures with captions, and ways to spoil them."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from trainers.miniature.world import (
    COLOURS,
    PATTERNS,
    SHAPES,
    STYLES,
    SUBJECTS,
    Scene,
    caption,
    draw,
    is_held_out,
    random_placement,
    random_scene,
    subject,
)


@dataclass(frozen=True)
class Pictures:
    """Drawn scenes; n pictures of 64 pixels."""

    pixels: UInt8[Tensor, "n 3 64 64"]
    scenes: tuple[Scene, ...]

    def __len__(self) -> int:
        return len(self.scenes)

    def chosen(self, indices: Int[Tensor, " b"]) -> list[Scene]:
        """The scenes of some pictures."""
        places = cast("list[int]", indices.tolist())
        return [self.scenes[place] for place in places]


def plain(count: int, seed: int) -> Pictures:
    """Pictures that the generator may see: no held-out subject and no held-out style."""
    return _drawn(count, seed, _plain_scene)


def wide(count: int, seed: int) -> Pictures:
    """Pictures of the wider world that the scoring models know: 30 % held-out subjects, 20 % held-out styles."""
    return _drawn(count, seed, _wide_scene)


def _drawn(count: int, seed: int, scene: Callable[[random.Random], Scene]) -> Pictures:
    drawn = [_one(scene, random.Random(f"{seed}/{index}")) for index in range(count)]
    pixels = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return Pictures(pixels, tuple(scene for _, scene in drawn))


def _one(make: Callable[[random.Random], Scene], rng: random.Random) -> tuple[np.ndarray, Scene]:
    scene = make(rng)
    return np.asarray(draw(scene, random_placement(rng))), scene


def _plain_scene(rng: random.Random) -> Scene:
    while is_held_out(scene := random_scene(rng)):
        pass
    return scene


def _wide_scene(rng: random.Random) -> Scene:
    kind = rng.random()
    if kind < 0.3:
        return subject(rng.choice(SUBJECTS), rng.choice(list(COLOURS)))
    if kind < 0.5:
        return replace(random_scene(rng, portraits=0), style=rng.choice(STYLES))
    return random_scene(rng)


def captions(scenes: Sequence[Scene], rng: random.Random, empty: float = 0.0) -> list[str]:
    """A caption for each scene: worded in several ways, and with the share `empty` of them left out."""
    return ["" if rng.random() < empty else _worded(scene, rng) for scene in scenes]


def _worded(scene: Scene, rng: random.Random) -> str:
    opening = rng.choice(("", "", "", "a photo of ", "a picture of "))
    return opening + caption(scene, "short" if rng.random() < 0.12 else "full")


def altered(scene: Scene, rng: random.Random, *, background: bool = False) -> Scene:
    """The same scene but for one attribute, which is what a description gets wrong most easily.

    Args:
        scene: A person gets other hair or another shirt, anything else another shape, colour, second colour or pattern.
        rng: Decides which.
        background: Whether that may be what changes.
    """
    taken = {scene.background, scene.colour, scene.second}
    if scene.person is not None:
        taken = {scene.background, scene.person.hair, scene.person.shirt}
    colour = rng.choice([name for name in COLOURS if name not in taken])
    if background and rng.random() < 0.3:
        return replace(scene, background=colour)
    if scene.person is not None:
        return replace(scene, person=replace(scene.person, **{rng.choice(("hair", "shirt")): colour}))
    changes: list[dict[str, str]] = [
        {"shape": rng.choice([shape for shape in SHAPES if shape != scene.shape])},
        {"colour": colour},
    ]
    if scene.fill in PATTERNS:
        changes += [{"second": colour}, {"fill": rng.choice([fill for fill in PATTERNS if fill != scene.fill])}]
    return replace(scene, name="", **cast("dict[str, Any]", rng.choice(changes)))


def to_unit(pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Bytes to [-1, 1]."""
    return pixels.float() / 127.5 - 1


def spoil(x: Float[Tensor, "b 3 64 64"], rng: torch.Generator) -> tuple[Float[Tensor, "b 3 64 64"], list[str]]:
    """Ruin each picture in one of five ways that failed training runs show; returns pictures and what was done."""
    spoiled: list[Tensor] = []
    names: list[str] = []
    for picture in x:
        way = int(torch.randint(5, (), generator=rng))
        strength = float(torch.rand((), generator=rng)) * 0.7 + 0.3
        spoiled.append(_WAYS[way](picture, strength, rng))
        names.append("blurry" if way == 0 else "noisy")
    return torch.stack(spoiled).clamp(-1, 1), names


def _blurred(x: Tensor, strength: float, _rng: torch.Generator) -> Tensor:
    return gaussian_blur(x, [15, 15], [1.5 + 4 * strength])


def _noised(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    return x + strength * torch.randn(x.shape, generator=rng)


def _shuffled(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Swap 8-pixel blocks: what latents without spatial order decode to."""
    blocks = x.reshape(3, 8, 8, 8, 8).permute(1, 3, 0, 2, 4).reshape(64, 3, 8, 8)
    chosen = torch.randperm(64, generator=rng)[: max(8, int(64 * strength))]
    blocks = blocks.clone()
    blocks[chosen] = blocks[chosen[torch.randperm(len(chosen), generator=rng)]]
    return blocks.reshape(8, 8, 3, 8, 8).permute(2, 0, 3, 1, 4).reshape(3, 64, 64)


def _clouded(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Replace the picture by colour clouds: what a collapsed denoiser draws."""
    coarse = torch.randn(1, 3, 10, 10, generator=rng)
    clouds = torch.nn.functional.interpolate(coarse, size=64, mode="bicubic")[0]
    return (1 - strength) * x + strength * clouds


def _blown_out(x: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Saturate and smear: what too much guidance or too high a rate draws."""
    return gaussian_blur(x, [9, 9], [2.0]) * (1 + 4 * strength) + 0.3 * strength * torch.randn(3, 1, 1, generator=rng)


_WAYS = (_blurred, _noised, _shuffled, _clouded, _blown_out)
