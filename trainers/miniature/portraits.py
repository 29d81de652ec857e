"""Several photos of one person: who is in them stays, all else changes; where the face is, is known.

Skin, eyes, width of the face, hair and its style are who somebody is. Shirt, glasses, background and place in the
picture differ from photo to photo.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from trainers.miniature.people import COLOURS, HAIR_STYLES, SKINS, Person, face_ellipse
from trainers.miniature.world import SIZE, Placement, Scene, draw, random_placement, with_article

TRIGGER = "img"
"""The word after "person" that stands for an identity, as in PhotoMaker."""
Box = tuple[int, int, int, int]
_ZOOM = 4


@dataclass(frozen=True)
class Portrait:
    """One photo of somebody."""

    person: Person
    background: str
    placement: Placement

    @property
    def scene(self) -> Scene:
        """What it shows."""
        return Scene(self.background, person=self.person)

    def draw(self) -> Image.Image:
        """The photo: RGB, `SIZE` pixels."""
        return draw(self.scene, self.placement)

    @property
    def box(self) -> Box:
        """Corners of the face: left, top, right, bottom in pixels."""
        left, top, right, bottom = (round(value) for value in self._face(SIZE))
        return max(0, left), max(0, top), min(SIZE, right), min(SIZE, bottom)

    def face_mask(self) -> Image.Image:
        """Where the face is: a mode "L" picture of `SIZE` pixels, 255 inside."""
        image = Image.new("L", (SIZE * _ZOOM, SIZE * _ZOOM), 0)
        ImageDraw.Draw(image).ellipse(self._face(SIZE * _ZOOM), fill=255)
        return image.resize((SIZE, SIZE), Image.Resampling.BOX)

    def caption(self, trigger: str = "") -> str:
        """What a photo of somebody known is said to show: only what is not who it is.

        Args:
            trigger: Said right after "person"; empty is nothing.
        """
        named = " ".join(filter(None, ["person", trigger]))
        glasses = " with glasses" if self.person.glasses else ""
        shirt, background = with_article(f"{self.person.shirt} shirt"), with_article(f"{self.background} background")
        return f"{with_article(named)}{glasses} in {shirt} on {background}"

    def _face(self, side: int) -> tuple[float, float, float, float]:
        place = self.placement
        return face_ellipse(self.person, (place.x * side, place.y * side, place.radius * side))


def somebody(rng: random.Random, like: Person | None = None) -> Person:
    """A new person; with the hair of another one if `like` is given, so that only the face tells them apart."""
    colours = list(COLOURS)
    return Person(
        hair=like.hair if like else rng.choice(colours),
        hair_style=like.hair_style if like else rng.choice(HAIR_STYLES),
        shirt="white",
        glasses=False,
        skin=rng.randrange(len(SKINS)),
        eyes=rng.choice(colours),
        width=rng.uniform(0.62, 0.9),  # as in the pictures that the generator has seen
    )


def photo(person: Person, rng: random.Random) -> Portrait:
    """Somebody, in any shirt, on any background, with glasses or without."""
    shirt = rng.choice(list(COLOURS))
    background = rng.choice([colour for colour in COLOURS if colour not in (person.hair, shirt)])
    return Portrait(
        replace(person, shirt=shirt, glasses=rng.random() < 0.3),
        background,
        random_placement(rng),
    )


def crowd(count: int, seed: int, alike: int = 1) -> list[Person]:
    """Different people, in groups of `alike` with the same hair."""
    rng, found = random.Random(f"crowd/{seed}"), list[Person]()
    while len(found) < count:
        person = somebody(rng, found[-1] if len(found) % alike else None)
        if person not in found:
            found.append(person)
    return found


def save_people(folder: Path, people: Sequence[Person], photos: int, seed: int, trigger: str = TRIGGER) -> None:
    """Photos of people, a subfolder each, with their masks, and the `index.json` that identity data has.

    Args:
        folder: Gets `p00/00.png`, `masks/p00/00.png` and so on.
        people: Who is shown.
        photos: Of each.
        seed: Of what varies.
        trigger: The captions' word for an identity.
    """
    index: dict[str, dict[str, object]] = {}
    for number, person in enumerate(people):
        rng, name = random.Random(f"photos/{seed}/{number}"), f"p{number:02d}"
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "masks" / name).mkdir(parents=True, exist_ok=True)
        for which in range(photos):
            taken, file = photo(person, rng), f"{name}/{which:02d}.png"
            taken.draw().save(folder / file)
            taken.face_mask().save(folder / "masks" / file)
            index[file] = {"text": taken.caption(trigger), "face_crop": taken.box, "identity": name}
    (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
