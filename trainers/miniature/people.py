"""The people of the miniature world: simple portraits whose identity is more than their captions say."""

from dataclasses import dataclass

from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "green": (45, 165, 65),
    "blue": (50, 85, 215),
    "yellow": (240, 215, 50),
    "purple": (140, 55, 185),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
    "pink": (250, 135, 190),
    "cyan": (50, 205, 220),
    "brown": (125, 80, 45),
    "grey": (130, 130, 130),
}
HAIR_STYLES = ("short", "long", "spiky")
SKINS = ((245, 214, 185), (224, 172, 130), (160, 105, 70), (95, 62, 45))


@dataclass(frozen=True)
class Person:
    """Who a portrait shows. Skin and eyes are never named in captions: they are what identity is made of."""

    hair: str
    hair_style: str
    shirt: str
    glasses: bool
    skin: int
    """Index into `SKINS`."""
    eyes: str
    width: float
    """Half the width of the face, relative to the head's radius."""


def face_ellipse(person: Person, box: tuple[float, float, float]) -> tuple[float, float, float, float]:
    """Corners of the face's ellipse: left, top, right, bottom, in the units of `box`.

    Args:
        person: Whose face it is.
        box: Centre and radius, as `draw_person` takes them.
    """
    cx, cy, r = box[0], box[1] - box[2] * 0.15, box[2] * 0.95
    half = r * person.width
    return cx - half, cy - r * 0.75, cx + half, cy + r


def draw_person(image: Image.Image, person: Person, box: tuple[float, float, float]) -> None:
    """A head and shoulders; the face is an ellipse of radius `box[2]` around the centre, a little above it."""
    cx, cy, r = box[0], box[1] - box[2] * 0.15, box[2] * 0.95
    half = r * person.width
    pen = ImageDraw.Draw(image)
    hair, skin = COLOURS[person.hair], SKINS[person.skin]
    shoulders = (cx - r * 1.25, cy + r * 0.95, cx + r * 1.25, cy + r * 3)
    if person.hair_style == "long":
        pen.rounded_rectangle((cx - half * 1.25, cy - r * 1.05, cx + half * 1.25, cy + r * 1.25), r * 0.5, fill=hair)
    pen.ellipse(shoulders, fill=COLOURS[person.shirt])
    pen.rectangle((cx - r * 0.25, cy + r * 0.7, cx + r * 0.25, cy + r * 1.15), fill=skin)
    pen.ellipse((cx - half * 1.08, cy - r * 1.08, cx + half * 1.08, cy + r * 0.6), fill=hair)
    pen.ellipse(face_ellipse(person, box), fill=skin)
    if person.hair_style == "spiky":
        for k in range(-3, 4):
            tip = cx + k * half * 0.4
            foot, point = half * 0.25, cy - r * 1.35
            pen.polygon([(tip - foot, cy - r * 0.6), (tip, point), (tip + foot, cy - r * 0.6)], fill=hair)
    for side in (-1, 1):
        ex, ey, size = cx + side * half * 0.42, cy + r * 0.02, r * 0.17
        pen.ellipse((ex - size, ey - size, ex + size, ey + size), fill=(250, 250, 250))
        iris = size * 0.72
        pen.ellipse((ex - iris, ey - iris, ex + iris, ey + iris), fill=COLOURS[person.eyes])
        if person.glasses:
            rim = size * 1.6
            pen.ellipse((ex - rim, ey - rim, ex + rim, ey + rim), outline=(20, 20, 20), width=max(2, round(r * 0.09)))
    mouth = (cx - half * 0.4, cy + r * 0.2, cx + half * 0.4, cy + r * 0.7)
    pen.arc(mouth, 20, 160, fill=(150, 40, 50), width=max(2, round(r * 0.1)))
