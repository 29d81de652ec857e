"""Where a photo's face is and whose it is, from what is known already or from a face embedder."""

from __future__ import annotations

import zipfile
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trainers.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from trainers.face import FaceEmbedder
    from trainers.prompt import Box


def find_face(
    embedder: FaceEmbedder | None, image: Image.Image, where: Path, vector: Tensor | None, box: Box | None
) -> tuple[Float[Tensor, " n"], Box]:
    """A photo's face vector and box; what is known already is not looked for.

    Raises:
        DataError: There is no face, or the box is not inside the picture.
        ConfigError: A face has to be looked for, and there is no embedder.
    """
    if box is not None and not (0 <= box[0] < box[2] <= image.width and 0 <= box[1] < box[3] <= image.height):
        raise DataError(f"{where}: the box {box} is not inside {image.width} x {image.height} pixels")
    if vector is not None and box is not None:
        return vector, box
    if embedder is None:
        raise ConfigError(f"{where}: its face's embedding and box are not both given; set train.faces to look for them")
    face = embedder.find(image, box)
    if face is None:
        raise DataError(f"{where}: no face found{f' in {box}' if box else ''}; choose another photo, or another box")
    return face.embedding if vector is None else vector, face.box if box is None else box


def read_embedding(path: Path, of: Path) -> Float[Tensor, " n"]:
    """The face embedding of the photo `of`, from a file of one or of many.

    Args:
        path: `.npy` with one vector, safetensors, or a dictionary that torch saved, by file name or its stem; a file
            of one tensor needs no name.
        of: The photo.

    Raises:
        DataError: The file cannot be read, or the photo is not in it.
    """
    vectors = read_embeddings(path)
    if len(vectors) == 1:
        return next(iter(vectors.values()))
    found = known_vector(vectors, of, of.parent)
    if found is None:
        raise DataError(f"{path}: no embedding of {of.name}; expected it under the file's name or stem")
    return found


def known_vector(vectors: Mapping[str, Tensor], photo: Path, folder: Path) -> Tensor | None:
    """The vector of a photo, by its path in `folder`, its file's name or its stem."""
    names = (photo.relative_to(folder).as_posix(), photo.name, photo.stem)
    return next((vectors[name] for name in names if name in vectors), None)


def read_embeddings(path: Path) -> dict[str, Tensor]:
    """All vectors of a file, by name; float32.

    Raises:
        DataError: It cannot be read, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        if path.suffix == ".npy":
            held: Any = {"": torch.from_numpy(np.load(path, allow_pickle=False))}
        elif path.suffix == ".safetensors":
            held = load_file(path)
        elif zipfile.is_zipfile(path):
            held = torch.load(path, weights_only=True)
        else:
            raise DataError(f"{path}: missing, or not a file of embeddings; expected .npy, .safetensors or torch's")
        vectors = {str(name): value.float().flatten() for name, value in held.items()}
    except (OSError, ValueError, RuntimeError, AttributeError, SafetensorError, UnpicklingError) as error:
        raise DataError(f"{path}: not a file of embeddings ({error})") from error
    broken = [name for name, value in vectors.items() if not bool(value.isfinite().all()) or not bool(value.any())]
    if broken:
        raise DataError(f"{path}: the embedding of {broken[0]!r} is zero or not finite")
    return vectors
