"""Frozen work of PhotoMaker, done once: who is in each photo, and what captions say."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from trainers.adapters.photomaker import face_pixels
from trainers.backbone import Moments
from trainers.batch import Split
from trainers.cache import digest
from trainers.data.identity import IdentityExample
from trainers.data.transforms import open_picture
from trainers.errors import DataError
from trainers.framing import Framing
from trainers.people.face_vectors import find_face, known_vector, read_embeddings
from trainers.people.words import Words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor

    from trainers.backbone import TextEmbeddings
    from trainers.cache import Tensors
    from trainers.frozen import Frozen, Images
    from trainers.methods.photomaker import PhotoMakerConfig
    from trainers.people.model import PhotoMaker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Identities:
    """Photos and captions as PhotoMaker takes them, in host memory; rows of photos are those of `Images`."""

    seen: Mapping[str, Tensor]
    """`tokens` [n, k, width] of an identity encoder that never changes; or, for one that is trained, its `pixels` and
    its face `vectors`."""
    words: Words
    captions: Mapping[str, int]
    """Each caption's row of `words`."""
    nothing: TextEmbeddings
    """No prompt, as one row."""

    def tokens(self, rows: Sequence[int], model: PhotoMaker) -> Float[Tensor, "b k width"]:
        """Tokens of the given photos, on the model's device."""
        picked = {name: value[list(rows)].to(model.device) for name, value in self.seen.items()}
        return picked["tokens"] if "tokens" in picked else model.encoder.tokens(picked["pixels"], picked["vectors"])


def identify(frozen: Frozen, images: Images, config: PhotoMakerConfig, model: PhotoMaker) -> tuple[Images, Identities]:
    """Find every face and read every caption; photos without a face are left out, counted and reported.

    Raises:
        DataError: Nobody is left, or the data is strict and a photo has no face.
    """
    everyone = (*images.split.train, *images.split.held_out)
    # Without validation what is held out was not encoded.
    encoded = cast("tuple[IdentityExample, ...]", everyone[: len(images.geometries)])
    rows = _look(frozen, encoded, config, model)
    kept = [i for i, row in enumerate(rows) if row is not None]
    faceless = tuple(example.path for example, row in zip(encoded, rows, strict=True) if row is None)
    for path in dict.fromkeys(faceless):
        log.warning("%s: no face found; it is left out", path)
    images = _keep(images, kept, faceless)
    if not images.split.train:
        raise DataError(f"{config.data.index_path}: no face found in any of {len(encoded)} photos")
    found = [row for row in rows if row is not None]
    seen = {name: torch.cat([row[name] for row in found]) for name in found[0]}
    captions = list(dict.fromkeys(example.prompt for example in (*images.split.train, *images.split.held_out)))
    words = _read(frozen, captions, config, model)
    nothing = frozen.backbone.encode_prompts([None])
    return images, Identities(seen, words, {caption: row for row, caption in enumerate(captions)}, nothing)


def _look(
    frozen: Frozen, examples: Sequence[IdentityExample], config: PhotoMakerConfig, model: PhotoMaker
) -> list[Tensors | None]:
    """Tokens of every photo, or what an encoder that is trained makes them of; None where there is no face."""
    data = config.data
    known = read_embeddings(data.embeddings) if data.embeddings else {}
    sources = (*(config.faces.files() if config.faces else ()), *([data.embeddings] if data.embeddings else []))
    network = frozen.describe((config.photomaker, *sources), torch.float32)
    trained = config.train_id_encoder

    @torch.no_grad()
    def make(i: int) -> Tensors | None:
        example = examples[i]
        image, size = open_picture(example), example.framing.original
        upright = Framing(size, size, (0, 0), size, example.framing.mirrored)
        image, box = upright.apply(image), upright.box(example.face)
        vector = known_vector(known, example.path, data.path) if known else None
        if vector is None and model.faces is None:
            raise DataError(
                f"{data.embeddings}: no embedding of {example.path}; expected it under the photo's path in the index, "
                "its name or its stem; add it, or set train.faces"
            )
        model.check_vector(vector, f"{data.embeddings}: the embedding of {example.path}")
        try:
            vector, _ = find_face(model.faces, image, example.path, vector, box)
        except DataError:
            if data.strict:
                raise
            return None
        if not trained:
            return {"tokens": model.identify(image, box, vector).cpu()}
        return {"pixels": face_pixels(image, box, model.encoder.sizes.image), "vectors": vector[None]}

    def key(i: int) -> str:
        return digest("face", examples[i].key, str(examples[i].face), str(trained), data.transform, network)

    return frozen.share("faces", key, make, len(examples))


def _keep(images: Images, kept: list[int], faceless: tuple[Path, ...]) -> Images:
    """The given rows of pictures, with those left out counted among the unreadable."""
    split = images.split
    if not faceless:
        return images
    train = tuple(split.train[i] for i in kept if i < len(split.train))
    held_out = tuple(split.held_out[i - len(split.train)] for i in kept if i >= len(split.train))
    if len(images.geometries) == len(split.train):
        held_out = split.held_out
    return replace(
        images,
        split=Split(train, held_out, (*split.unreadable, *dict.fromkeys(faceless))),
        moments=Moments(images.moments.mean[kept], images.moments.logvar[kept]),
        geometries=tuple(images.geometries[i] for i in kept),
    )


def _read(frozen: Frozen, captions: list[str], config: PhotoMakerConfig, model: PhotoMaker) -> Words:
    """Embeddings of all captions, through the cache, in host memory."""
    count = str(model.encoder.sizes.tokens * config.references)
    network = digest(frozen.describe(frozen.config.text_files(), frozen.backbone.dtype), config.trigger_word, count)
    options = frozen.config.text_options

    def make(i: int) -> Tensors:
        return {
            name: value.cpu() for name, value in model.reader.read(captions[i], config.references).tensors().items()
        }

    rows = frozen.share("captions", lambda i: digest("words", captions[i], network, *options), make, len(captions))
    return Words.cat([Words(**row) for row in rows if row is not None])
