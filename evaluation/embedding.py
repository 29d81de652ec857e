"""What all encoders of pictures share: a picture is embedded once, a reference once per cache."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING

import numpy as np
import torch
from typing_extensions import override

from evaluation.metric import ImageEncoder
from trainers.cache import Cache, digest
from trainers.data import transforms

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from jaxtyping import Float, Float32
    from PIL import Image
    from torch import Tensor

    from trainers.batch import Source


class PictureEncoder(ImageEncoder):
    """A tower for pictures, on one device; memory and disk remember what it said."""

    def __init__(self, name: str, files: Sequence[Path], device: torch.device, cache: Cache) -> None:
        content = cache.hash_files(files)
        self.model = f"{name}@{content[:12]}"
        self._state = digest(content, device.type, torch.__version__)
        self._device = device
        self._cache = cache
        self._images: dict[str, Float32[np.ndarray, " width"]] = {}
        self._rows: dict[str, Float32[np.ndarray, " width"]] = {}

    @override
    def embed_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        keys = [_content_hash(image) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._images}
        if new:
            self._images.update(zip(new, self._compute_images(list(new.values())), strict=True))
        return np.stack([self._images[key] for key in keys])

    @override
    def embed_references(self, sources: Sequence[Source]) -> Float32[np.ndarray, "n width"]:
        def compute(source: Source) -> Float32[np.ndarray, " width"]:
            return self.embed_images([transforms.open_picture(source)])[0]  # it may be judged, too

        def row(source: Source) -> Float32[np.ndarray, " width"]:
            content = hashlib.sha256(source.read_bytes()).hexdigest()
            key = digest("clip reference", content, transforms.VERSION, self._state)
            return self._recall(key, lambda: compute(source))

        return np.stack([row(source) for source in sources])

    def _recall(self, key: str, compute: Callable[[], Float32[np.ndarray, " width"]]) -> Float32[np.ndarray, " width"]:
        """From memory, from disk, or computed: one at a time, so that a row never depends on its neighbours."""
        if key not in self._rows:
            stored = self._cache.get(key)
            if stored is None:
                stored = {"embedding": torch.from_numpy(compute())}
                self._cache.put(key, stored)
            self._rows[key] = stored["embedding"].numpy()
        return self._rows[key]

    def _compute_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        pixels = torch.stack([self._preprocess(image) for image in images]).to(self._device)
        return self._unit(lambda: self._image_features(pixels))

    def _unit(self, features: Callable[[], Tensor]) -> Float32[np.ndarray, "n width"]:
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return torch.nn.functional.normalize(features(), dim=-1).cpu().numpy()

    @abstractmethod
    def _preprocess(self, image: Image.Image) -> Float[Tensor, "3 h w"]:
        """The model's own resizing, cropping and normalisation."""

    @abstractmethod
    def _image_features(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b width"]:
        """Embeddings, of any length."""


def _content_hash(image: Image.Image) -> str:
    return hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest()
