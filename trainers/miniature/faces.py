"""Training of the face embedder on people of the miniature world: is there a face, where, and whose."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn

from trainers.faces.miniature import MARGIN, build_network, to_pixels
from trainers.framing import grow_to_square
from trainers.miniature.people import Person
from trainers.miniature.pictures import Pictures
from trainers.miniature.portraits import Box, Portrait, crowd, photo
from trainers.miniature.training import Schedule, train

_ALIKE = 4
"""People with the same hair in a group."""
_GROUPS, _NOBODY = 6, 16
_TEMPERATURE = 0.1
_NORM = 8.0
"""Length of an embedding that training leans towards: the square root of its numbers."""


@dataclass(frozen=True)
class Album:
    """Photos of people, and pictures of anything but people."""

    people: list[list[Portrait]]
    """By person, `_ALIKE` neighbours having the same hair; two and more photos of each."""
    images: list[list[Image.Image]]
    """The same, drawn."""
    others: list[Image.Image]

    @classmethod
    def draw(cls, count: int, photos: int, seed: int, pictures: Pictures) -> "Album":
        """Draw `photos` photos of `count` people (rounded up to whole groups)."""
        groups = max(2, -(-count // _ALIKE))
        people = [
            _photos(person, photos, seed, place) for place, person in enumerate(crowd(groups * _ALIKE, seed, _ALIKE))
        ]
        images = [[portrait.draw() for portrait in portraits] for portraits in people]
        bare = [place for place, scene in enumerate(pictures.scenes) if scene.person is None]
        others = [Image.fromarray(pictures.pixels[place].permute(1, 2, 0).numpy()) for place in bare]
        return cls(people, images, others)


def _photos(person: Person, count: int, seed: int, place: int) -> list[Portrait]:
    rng = random.Random(f"album/{seed}/{place}")
    return [photo(person, rng) for _ in range(count)]


def train_face(album: Album, schedule: Schedule) -> Any:
    """Tell people with the same hair apart (InfoNCE, van den Oord et al., 2018, arXiv:1807.03748), and find faces.

    Half of the photos are shown whole and half cropped around a box that is a little wrong, as callers do both.
    """
    torch.manual_seed(schedule.seed)
    network = build_network()

    def loss(rng: random.Random) -> Tensor:
        starts = [rng.randrange(len(album.people) // _ALIKE) * _ALIKE for _ in range(_GROUPS)]
        who = [start + k for start in dict.fromkeys(starts) for k in range(_ALIKE)]
        shown = [_shown(album, person, rng) for _ in range(2) for person in who]
        nobody = [to_pixels(rng.choice(album.others), network.config["side"]) for _ in range(_NOBODY)]
        x = _varied(torch.cat([*(pixels for pixels, _ in shown), *nobody]))
        embedding, presence, place = network(x)
        boxes = torch.tensor([box for _, box in shown])
        there = (torch.arange(len(x)) < len(shown)).float()
        found = nn.functional.binary_cross_entropy_with_logits(presence, there)
        placed = (place[: len(shown)] - boxes).abs().mean()
        one, other = embedding[: len(who)], embedding[len(who) : len(shown)]
        length = (embedding[: len(shown)].norm(dim=1) / _NORM - 1).square().mean()
        return _told_apart(one, other) + found + 4 * placed + 0.1 * length

    train("face", (network,), loss, schedule)
    return network


def _shown(album: Album, person: int, rng: random.Random) -> tuple[Tensor, tuple[float, ...]]:
    """A photo of a person, and where the face is in it, in shares of what is shown."""
    which = rng.randrange(len(album.people[person]))
    image, box = album.images[person][which], album.people[person][which].box
    region = (0, 0, *image.size)
    if rng.random() < 0.5:
        wrong = [corner + rng.randint(-2, 2) for corner in box]
        region = grow_to_square(cast("Box", tuple(wrong)), image.size, MARGIN)
    left, top, right, bottom = region
    width, height = right - left, bottom - top
    shares = ((box[0] - left) / width, (box[1] - top) / height, (box[2] - left) / width, (box[3] - top) / height)
    return to_pixels(image.crop(region), 64), shares


def _varied(x: Tensor) -> Tensor:
    """Soften, tint and noise pictures a little, as an autoencoder and a denoiser do."""
    soft = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    share = torch.rand(len(x), 1, 1, 1) * 0.7
    x = (1 - share) * x + share * soft + 0.06 * torch.rand(len(x), 1, 1, 1) * torch.randn_like(x)
    return (x * (1 + 0.06 * torch.randn(len(x), 1, 1, 1)) + 0.03 * torch.randn(len(x), 3, 1, 1)).clamp(-1, 1)


def _told_apart(one: Tensor, other: Tensor) -> Tensor:
    scores = nn.functional.normalize(one, dim=1) @ nn.functional.normalize(other, dim=1).T / _TEMPERATURE
    target = torch.arange(len(one))
    return (nn.functional.cross_entropy(scores, target) + nn.functional.cross_entropy(scores.T, target)) / 2


@torch.no_grad()
def face_quality(network: Any, album: Album) -> dict[str, float]:
    """How well people it has not seen are told apart and found, on photos that are shown whole.

    Returns:
        Mean cosine of photos of the same person, of people with the same hair and of any two people; the area under
        the curve (that of the same person is larger) against both; how often a face is seen where there is none or
        missed where there is one; the mean intersection over union of boxes.
    """
    side = network.config["side"]
    seen = [network(torch.cat([to_pixels(image, side) for image in images])) for images in album.images]
    embeddings = nn.functional.normalize(torch.stack([answer[0] for answer in seen]), dim=-1)
    same, alike, others = _cosines(embeddings)
    false = network(torch.cat([to_pixels(image, side) for image in album.others]))[1]
    missed = torch.cat([answer[1] for answer in seen])
    pairs = zip(album.people, seen, strict=True)
    overlaps = [_iou(p.box, [64 * v for v in row.tolist()]) for ps, a in pairs for p, row in zip(ps, a[2], strict=True)]
    found = {
        "cosine_same": same.mean(),
        "cosine_same_hair": alike.mean(),
        "cosine_others": others.mean(),
        "auc_same_hair": _auc(same, alike),
        "auc_others": _auc(same, others),
        "false_faces": (false > 0).float().mean(),
        "missed_faces": (missed <= 0).float().mean(),
    }
    return {name: round(float(value), 4) for name, value in found.items()} | {"box_iou": round(mean(overlaps), 4)}


def _cosines(embeddings: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of pairs of photos of one person, of different people in one group, and of people in different groups."""
    people, photos = embeddings.shape[:2]
    table = (embeddings.flatten(0, 1) @ embeddings.flatten(0, 1).T).triu(1)
    person = torch.arange(people).repeat_interleave(photos)
    group = person // _ALIKE
    upper = torch.ones_like(table).triu(1).bool()
    one, near = person[:, None] == person, group[:, None] == group
    return table[upper & one], table[upper & ~one & near], table[upper & ~near]


def _auc(higher: Tensor, lower: Tensor) -> Tensor:
    return (higher[:, None] > lower[None]).float().mean()


def _iou(first: Sequence[float], second: Sequence[float]) -> float:
    shared = _area((*map(max, first[:2], second[:2]), *map(min, first[2:], second[2:])))
    return shared / (_area(first) + _area(second) - shared)


def _area(corners: Sequence[float]) -> float:
    return max(0.0, corners[2] - corners[0]) * max(0.0, corners[3] - corners[1])
