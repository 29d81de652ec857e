"""The miniature world: captioned 64-pixel pictures that are cheap to draw and known to the pixel.

A `Scene` says what a picture shows, a `Placement` where; `draw` renders them and `caption` describes them. Patterns
are fixed to the shape, so a scene at a placement has exactly one picture: that is what makes `truth.py` possible.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from trainers.miniature.people import COLOURS, HAIR_STYLES, SKINS, Person, draw_person

SIZE = 64
"""Pixels on each side of a picture."""
_ZOOM = 3  # drawn larger, then reduced: anti-aliased edges

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart", "moon", "hexagon")
PATTERNS = ("striped", "dotted", "checkered", "split")

SUBJECTS = ("zog", "wug", "dax", "blik", "fep", "toma")
"""Names that the generator never sees; the scoring models know what they look like."""
STYLES = ("bim", "nuvo")
"""Names of styles that the generator never sees; the scoring models know them."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows."""

    background: str
    shape: str = ""
    """One of `SHAPES`, or empty for a portrait."""
    fill: str = "solid"
    """solid, hollow or one of `PATTERNS`."""
    colour: str = ""
    second: str = ""
    """Second colour of a pattern."""
    outlined: bool = False
    person: Person | None = None
    name: str = ""
    """The subject's name, which replaces the description in the caption."""
    style: str = ""
    """One of `STYLES`, or empty for plain."""


@dataclass(frozen=True)
class Placement:
    """Where the object is: centre and radius as fractions of the picture."""

    x: float = 0.5
    y: float = 0.5
    radius: float = 0.34


_SUBJECT_SCENES = {
    "zog": Scene("blue", "star", "striped", "pink", "cyan", outlined=True),
    "wug": Scene("blue", "heart", "checkered", "yellow", "purple"),
    "dax": Scene("blue", "hexagon", "dotted", "orange", "black"),
    "blik": Scene("blue", "diamond", "split", "green", "white", outlined=True),
    "fep": Scene("blue", "moon", "striped", "red", "grey"),
    "toma": Scene("blue", "cross", "checkered", "cyan", "brown"),
}


def subject(name: str, background: str) -> Scene:
    """The held-out subject called `name` on a plain background."""
    return replace(_SUBJECT_SCENES[name], background=background, name=name)


def is_held_out(scene: Scene) -> bool:
    """Whether the generator must not see this scene: it is a subject or a style kept for adapters to learn."""
    looks = {(s.shape, s.fill, frozenset((s.colour, s.second))) for s in _SUBJECT_SCENES.values()}
    return bool(scene.style) or (scene.shape, scene.fill, frozenset((scene.colour, scene.second))) in looks


def random_placement(rng: random.Random) -> Placement:
    """A placement as training pictures have it."""
    return Placement(rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.27, 0.40))


def random_scene(rng: random.Random, portraits: float = 0.15) -> Scene:
    """A scene of the plain world: no subject's name, no style; `portraits` is the share of people."""
    if rng.random() < portraits:
        hair, shirt, eyes, background = (rng.choice(list(COLOURS)) for _ in range(4))
        while background in (hair, shirt):
            background = rng.choice(list(COLOURS))
        person = Person(
            hair,
            rng.choice(HAIR_STYLES),
            shirt,
            glasses=rng.random() < 0.3,
            skin=rng.randrange(len(SKINS)),
            eyes=eyes,
            width=rng.uniform(0.62, 0.9),
        )
        return Scene(background, person=person)
    colour, second, background = rng.sample(list(COLOURS), 3)
    fill = rng.choice(("solid", "solid", "solid", "hollow", *PATTERNS))
    second = second if fill in PATTERNS else ""
    return Scene(background, rng.choice(SHAPES), fill, colour, second, outlined=rng.random() < 0.25)


def caption(scene: Scene, detail: Literal["full", "short"] = "full") -> str:
    """The caption of `scene`; "short" leaves the background and the pattern unsaid."""
    text = with_article(_describe(scene, detail))
    if detail == "full":
        text += f" on {with_article(scene.background)} background"
    return f"{text} in {scene.style} style" if scene.style else text


def with_article(noun: str) -> str:
    """The noun with its article: a star, an orange star."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _describe(scene: Scene, detail: str) -> str:
    if scene.name:
        return scene.name
    if scene.person is not None:
        person = scene.person
        if detail == "short":
            return "person"
        glasses = " and glasses" if person.glasses else ""
        return f"person with {person.hair_style} {person.hair} hair{glasses} in a {person.shirt} shirt"
    if detail == "short":
        return f"{scene.colour} {scene.shape}"
    outlined = "outlined " if scene.outlined else ""
    if scene.fill in PATTERNS:
        return f"{outlined}{scene.colour} and {scene.second} {scene.fill} {scene.shape}"
    hollow = "hollow " if scene.fill == "hollow" else ""
    return f"{outlined}{hollow}{scene.colour} {scene.shape}"


def attributes(scene: Scene) -> list[int]:
    """What a full caption says, as one class per attribute; 0 where it says nothing."""
    colours = ["", *COLOURS]
    person = scene.person
    return [
        colours.index(scene.background),
        ["", *SHAPES].index(scene.shape),
        ["solid", "hollow", *PATTERNS].index(scene.fill),
        colours.index(scene.colour),
        colours.index(scene.second),
        int(scene.outlined),
        colours.index(person.hair if person else ""),
        ["", *HAIR_STYLES].index(person.hair_style if person else ""),
        colours.index(person.shirt if person else ""),
        int(person.glasses if person else False),
    ]


def words() -> list[str]:
    """Every word a caption can contain, in a fixed order, held-out names included."""
    grammar = "a an on in and with of the".split()
    plain = "photo picture background outlined hollow person hair glasses shirt style".split()
    quality = "blurry noisy clean sharp".split()
    return [*grammar, *plain, *quality, *SHAPES, *PATTERNS, *HAIR_STYLES, *COLOURS, *SUBJECTS, *STYLES]


def draw(scene: Scene, placement: Placement) -> Image.Image:
    """Render `scene` at `placement`: an RGB picture of `SIZE` pixels."""
    image = _backdrop(scene)
    side = image.width
    box = (placement.x * side, placement.y * side, placement.radius * side)
    if scene.style == "bim":
        _paste_bim(image, scene, box)
    elif scene.style == "nuvo":
        _paste_nuvo(image, scene, box)
    elif scene.person is not None:
        draw_person(image, scene.person, box)
    else:
        _paste(image, scene, box)
    return image.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw_background(scene: Scene) -> Image.Image:
    """`scene` without its object."""
    return _backdrop(scene).resize((SIZE, SIZE), Image.Resampling.BOX)


def mask(scene: Scene, placement: Placement) -> Image.Image:
    """Where the object (its outline included) is: a mode "L" picture of `SIZE` pixels, 255 inside."""
    side = SIZE * _ZOOM
    box = (placement.x * side, placement.y * side, placement.radius * side)
    if scene.person is not None:
        canvas = Image.new("RGB", (side, side), (255, 0, 255))
        draw_person(canvas, scene.person, box)
        covered = (np.asarray(canvas) != (255, 0, 255)).any(-1)
        found = Image.fromarray((covered * 255).astype(np.uint8))
    else:
        found = _outline(scene.shape, box, side, 1.2 if scene.outlined or scene.style else 1.0)
    return found.resize((SIZE, SIZE), Image.Resampling.BOX)


_Box = tuple[float, float, float]
_NIGHT = (30, 20, 60)


def _paste(image: Image.Image, scene: Scene, box: _Box) -> None:
    side = image.width
    if scene.outlined:
        rim = COLOURS["black" if scene.background == "white" else "white"]
        image.paste(rim, (0, 0, side, side), _outline(scene.shape, box, side, 1.2))
    image.paste(_texture(scene, box, side), (0, 0), _outline(scene.shape, box, side, 1.0))
    if scene.fill == "hollow":
        inner = (box[0], box[1], box[2] * 0.58)
        image.paste(COLOURS[scene.background], (0, 0, side, side), _outline(scene.shape, inner, side, 1.0))


def _backdrop(scene: Scene) -> Image.Image:
    """The background at drawing size: one colour, or what the style makes of it."""
    side = SIZE * _ZOOM
    image = Image.new("RGB", (side, side), COLOURS[scene.background])
    if scene.style == "bim":
        image.paste(_NIGHT, (0, 0, side, side))
        image.paste((70, 25, 95), (0, side // 2, side, side))
    elif scene.style == "nuvo":
        edge = side // 8
        image.paste((250, 235, 200), (edge, edge, side - edge, side - edge))
    return image


def _paste_bim(image: Image.Image, scene: Scene, box: _Box) -> None:
    """Neon: in a dark two-tone night, the object is a glowing line in its own colour."""
    side = image.width
    image.paste(COLOURS["white"], (0, 0, side, side), _outline(scene.shape, box, side, 1.15))
    image.paste(COLOURS[scene.colour], (0, 0, side, side), _outline(scene.shape, box, side, 1.02))
    image.paste(_NIGHT, (0, 0, side, side), _outline(scene.shape, (box[0], box[1], box[2] * 0.6), side, 1.0))


def _paste_nuvo(image: Image.Image, scene: Scene, box: _Box) -> None:
    """Poster: on cream paper in a thick frame of the background's colour, the object has a black shadow."""
    side = image.width
    shift = side * 0.06
    shadow = (box[0] + shift, box[1] + shift, box[2])
    image.paste(COLOURS["black"], (0, 0, side, side), _outline(scene.shape, shadow, side, 1.0))
    image.paste(_texture(scene, box, side), (0, 0), _outline(scene.shape, box, side, 1.0))


def _texture(scene: Scene, box: _Box, side: int) -> Image.Image:
    """The object's surface; its pattern is fixed to the object's centre and scales with it."""
    cx, cy, r = box
    y, x = np.mgrid[0:side, 0:side]
    u, v = (x - cx) / r, (y - cy) / r
    if scene.fill == "striped":
        second = np.floor((v + 10.2) / 0.4) % 2 == 1
    elif scene.fill == "split":
        second = u > 0
    elif scene.fill == "checkered":
        second = (np.floor((u + 10) / 0.5) + np.floor((v + 10) / 0.5)) % 2 == 1
    elif scene.fill == "dotted":
        du, dv = (u + 10.3) % 0.6 - 0.3, (v + 10.3) % 0.6 - 0.3
        second = du**2 + dv**2 < 0.17**2
    else:
        second = np.zeros((side, side), bool)
    colours = np.array([COLOURS[scene.colour], COLOURS[scene.second or scene.colour]], np.uint8)
    return Image.fromarray(colours[second.astype(int)])


def _outline(shape: str, box: _Box, side: int, grow: float) -> Image.Image:
    """The area of `shape`, its radius multiplied by `grow`: a mode "L" picture, 255 inside."""
    cx, cy, r = box[0], box[1], box[2] * grow
    image = Image.new("L", (side, side), 0)
    pen = ImageDraw.Draw(image)
    if shape in ("circle", "ring", "moon"):
        pen.ellipse((cx - r, cy - r, cx + r, cy + r), fill=255)
        if shape == "ring":
            hole = r * 0.5 / grow**2
            pen.ellipse((cx - hole, cy - hole, cx + hole, cy + hole), fill=0)
        if shape == "moon":
            bite, shift = r * 0.85 / grow, r * 0.6
            pen.ellipse((cx + shift - bite, cy - bite, cx + shift + bite, cy + bite), fill=0)
    elif shape == "cross":
        arm = r * 0.36 * (1.25 if grow > 1.1 else 1)
        pen.rectangle((cx - arm, cy - r, cx + arm, cy + r), fill=255)
        pen.rectangle((cx - r, cy - arm, cx + r, cy + arm), fill=255)
    else:
        pen.polygon([(cx + r * px, cy + r * py) for px, py in _POLYGONS[shape]], fill=255)
    return image


def _regular(corners: int, start: float = 0.0) -> list[tuple[float, float]]:
    turns = [start + 2 * math.pi * k / corners for k in range(corners)]
    return [(math.sin(t), -math.cos(t)) for t in turns]


def _star() -> list[tuple[float, float]]:
    points = _regular(10)
    return [(px * k, py * k) for i, (px, py) in enumerate(points) for k in ((1.0 if i % 2 == 0 else 0.48),)]


def _heart() -> list[tuple[float, float]]:
    ts = np.linspace(0, 2 * math.pi, 60)
    x = 16 * np.sin(ts) ** 3
    y = -(13 * np.cos(ts) - 5 * np.cos(2 * ts) - 2 * np.cos(3 * ts) - np.cos(4 * ts))
    return [(float(a) / 16.5, float(b) / 16.5) for a, b in zip(x, y, strict=True)]


_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "diamond": [(0, -1), (0.78, 0), (0, 1), (-0.78, 0)],
    "hexagon": _regular(6, math.pi / 6),
    "star": _star(),
    "heart": _heart(),
}


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of pictures side by side, for people to look at."""
    width = max(len(row) for row in rows)
    sheet = Image.new("RGB", (width * SIZE, len(rows) * SIZE), (255, 255, 255))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * SIZE, y * SIZE))
    return sheet
