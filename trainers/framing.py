"""From a picture file to a training picture: one object moves pixels and boxes alike."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.batch import Geometry

if TYPE_CHECKING:
    from PIL import Image

    from trainers.prompt import Box


@dataclass(frozen=True)
class Framing:
    """Mirror (if wanted), resize, crop. Sizes are (height, width), as SDXL counts them."""

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    """Top and left, in the resized picture."""
    size: tuple[int, int]
    mirrored: bool = False

    @classmethod
    def around(
        cls, original: tuple[int, int], size: tuple[int, int], box: Box | None = None, *, mirrored: bool = False
    ) -> Framing:
        """The largest part of a picture that has the shape of `size`, as near to the centre as `box` allows.

        Args:
            original: Height and width of the upright picture.
            size: Height and width wanted.
            box: A face, in pixels of the upright picture, not mirrored; it is kept in sight.
            mirrored: Whether left and right are exchanged first.
        """
        scale = max(size[0] / original[0], size[1] / original[1])
        resized = (max(size[0], round(original[0] * scale)), max(size[1], round(original[1] * scale)))
        whole = cls(original, resized, (0, 0), resized, mirrored)
        left, top, right, bottom = whole.box(box) if box else (0, 0, 0, 0)
        crop = (
            _slide(resized[0] - size[0], size[0], (top, bottom) if box else None),
            _slide(resized[1] - size[1], size[1], (left, right) if box else None),
        )
        return cls(original, resized, crop, size, mirrored)

    @property
    def geometry(self) -> Geometry:
        """What SDXL is told."""
        return Geometry(self.original, self.crop, self.size)

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture, framed."""
        from PIL import Image, ImageOps

        if self.mirrored:
            image = ImageOps.mirror(image)
        height, width = self.resized
        if (width, height) != image.size:
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        top, left = self.crop
        return image.crop((left, top, left + self.size[1], top + self.size[0]))

    def box(self, box: Box) -> Box:
        """A box of the original in pixels of the framed picture: rounded outward, and cut where the picture ends."""
        height, width = self.original
        left, top, right, bottom = box
        if self.mirrored:
            left, right = width - right, width - left
        down, across = self.resized[0] / height, self.resized[1] / width
        return (
            max(0, _floor(left * across) - self.crop[1]),
            max(0, _floor(top * down) - self.crop[0]),
            min(self.size[1], _ceil(right * across) - self.crop[1]),
            min(self.size[0], _ceil(bottom * down) - self.crop[0]),
        )


def grow_to_square(box: Box, size: tuple[int, int], share: float = 0.2) -> Box:
    """A box with its short sides lengthened to a square and `share` of its side added all around.

    Args:
        box: In a picture.
        size: (width, height) of that picture, where it ends.
        share: Of the square's side.
    """
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    margin = int(share * side)
    left, top = left - (side - (right - left)) // 2 - margin, top - (side - (bottom - top)) // 2 - margin
    side += 2 * margin
    return max(0, left), max(0, top), min(size[0], left + side), min(size[1], top + side)


def _slide(room: int, length: int, span: tuple[int, int] | None) -> int:
    """Where a window of `length` begins, 0 to `room`: at the centre, or no further from it than `span` asks."""
    place = room // 2
    if span is None:
        return place
    start, end = span
    place = (start + end - length) // 2 if end - start >= length else min(max(place, end - length), start)
    return min(max(place, 0), room)


def _floor(value: float) -> int:
    # A hair, so that 3 * (64 / 96) is 2.
    return math.floor(value + 1e-6)


def _ceil(value: float) -> int:
    return math.ceil(value - 1e-6)
