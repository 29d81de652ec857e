"""From a picture file, as cameras and the web make them, to pixels."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import PIL
from PIL import Image, ImageOps

from trainers.batch import Geometry, Picture
from trainers.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = f"1, Pillow {PIL.__version__}"
"""Changes whenever the pixels that these functions return change."""


def open_picture(path: Path) -> Image.Image:
    """Decode a picture: upright by its EXIF tag, transparency over white, as RGB.

    Raises:
        DataError: The file is missing, truncated, or not a picture.
    """
    try:
        with warnings.catch_warnings():
            # A large photo is welcome; Pillow still refuses what can only be an attack on memory.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                return _flatten(ImageOps.exif_transpose(file))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be decoded ({error}); replace or remove the file") from error


def _flatten(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Sixteen bits of grey; Pillow's own conversion would clip at 255.
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def crop_square(image: Image.Image, resolution: int) -> tuple[Image.Image, Geometry]:
    """Resize so that the short side is `resolution`, then cut a centred square."""
    width, height = image.size
    scale = resolution / min(width, height)
    resized = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    left, top = (resized[0] - resolution) // 2, (resized[1] - resolution) // 2
    if resized != image.size:
        image = image.resize(resized, Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + resolution, top + resolution))
    return image, Geometry((height, width), (top, left), (resolution, resolution))


def square_picture(path: Path, resolution: int) -> Picture:
    """A training picture of resolution x resolution pixels.

    Raises:
        DataError: As `open_picture`.
    """
    import numpy as np
    import torch

    image, geometry = crop_square(open_picture(path), resolution)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32))
    # 0 .. 255 to -1 .. 1.
    return Picture((pixels / 127.5 - 1).permute(2, 0, 1).unsqueeze(0), geometry)
