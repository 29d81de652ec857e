"""From a picture file, as cameras and the web make them, to pixels."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import PIL
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from trainers.batch import Geometry, Picture
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from trainers.batch import Source

VERSION = f"1, Pillow {PIL.__version__}"
"""Changes whenever the pixels that these functions return change."""


def open_picture(source: Source) -> Image.Image:
    """Decode a picture: upright by its EXIF tag, transparency over white, as RGB.

    Raises:
        DataError: The file is missing, truncated, or not a picture.
    """
    try:
        with warnings.catch_warnings():
            # A large photo is welcome; Pillow still refuses what can only be an attack on memory.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(source.read_bytes())) as file:
                return _flatten(ImageOps.exif_transpose(file))
    except UnidentifiedImageError as error:
        raise DataError(f"{source}: cannot be decoded (not a picture); replace or remove the file") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: cannot be decoded ({error}); replace or remove the file") from error


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Sixteen bits of grey; Pillow's own conversion would clip at 255.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def cut(
    image: Image.Image, size: tuple[int, int], place: Callable[[int], int] = lambda margin: margin // 2
) -> tuple[Image.Image, Geometry]:
    """Resize so that `size` is just covered, then cut it out.

    Args:
        image: Of any size.
        size: Height and width.
        place: Where the cut begins along the side that is too long, given by how many pixels it is longer; the default
            is the centre.
    """
    (width, height), (high, wide) = image.size, size
    scale = max(wide / width, high / height)
    resized = (max(wide, round(width * scale)), max(high, round(height * scale)))
    margins = (resized[0] - wide, resized[1] - high)
    left, top = (place(margin) if margin else 0 for margin in margins)
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    return image.crop((left, top, left + wide, top + high)), Geometry((height, width), (top, left), size)


def cut_picture(
    source: Source, size: tuple[int, int], place: Callable[[int], int] = lambda margin: margin // 2
) -> Picture:
    """A training picture of this height and width; arguments as of `cut`.

    Raises:
        DataError: As `open_picture`.
    """
    import numpy as np
    import torch

    image, geometry = cut(open_picture(source), size, place)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32))
    # 0 .. 255 to -1 .. 1.
    return Picture((pixels / 127.5 - 1).permute(2, 0, 1).unsqueeze(0), geometry)


def upright_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture once it stands upright, from the file's header.

    Raises:
        OSError: It is missing, or not a picture that can be decoded.
    """
    try:
        with Image.open(path) as image:
            # As text it turns nothing; the last four values exchange the sides.
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            return image.size if turned else (image.height, image.width)
    except (ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise OSError(f"{path}: {error}") from error


def find_size(path: Path, where: str) -> tuple[int, int]:
    """As `upright_size`.

    Raises:
        DataError: It is missing, or not a picture; begins with `where`.
    """
    try:
        return upright_size(path)
    except OSError as error:
        raise DataError(f"{where}: {path} cannot be read ({error}); expected a picture") from error
