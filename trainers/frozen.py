"""Frozen work done once: moments of all pictures and embeddings of all prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.backbone import Backbone, BackboneConfig, Moments, TextEmbeddings
from trainers.batch import DataConfig, Example, Geometry, Split
from trainers.cache import Cache, Tensors, digest
from trainers.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Frozen:
    """Where frozen work happens: a model, an optional cache, and the processes that share the work."""

    config: BackboneConfig
    backbone: Backbone
    cache: Cache | None
    accelerator: Accelerator

    def share(
        self, key: Callable[[int], str], make: Callable[[int], Tensors | None], count: int
    ) -> list[Tensors | None]:
        """`make(i)` for every i below `count`, through the cache: each process makes its share of what is missing."""
        cache = self.cache
        if cache is None:
            return [make(i) for i in range(count)]

        def recall(i: int) -> Tensors | None:
            found = cache.get(key(i))
            if found is None and (found := make(i)) is not None:
                cache.put(key(i), found)
            return found

        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if world > 1:
            for i in range(rank, count, world):
                recall(i)
            self.accelerator.wait_for_everyone()
        return [recall(i) for i in range(count)]

    def describe(self, files: Iterable[Path], dtype: torch.dtype) -> str:
        """Everything besides the input that determines what a frozen network of `files` answers."""
        model = self.cache.hash_files(files) if self.cache else ""
        return digest(model, str(dtype), self.backbone.device.type, torch.__version__)


@dataclass(frozen=True)
class Images:
    """All training pictures as the denoiser needs them, in host memory; row i is `split.train[i]`."""

    split: Split
    """What was asked for, less the pictures that cannot be decoded."""
    moments: Moments
    geometries: tuple[Geometry, ...]

    def select(self, indices: Sequence[int], device: torch.device) -> Moments:
        """Moments of the given rows, on `device`."""
        rows = list(indices)
        return Moments(
            self.moments.mean[rows].to(device, non_blocking=True),
            self.moments.logvar[rows].to(device, non_blocking=True),
        )

    def first(self, count: int) -> Images:
        """The first `count` rows."""
        moments = Moments(self.moments.mean[:count], self.moments.logvar[:count])
        return Images(replace(self.split, train=self.split.train[:count]), moments, self.geometries[:count])

    def joined(self, other: Images) -> Images:
        """These rows, then the training pictures of `other`; what is held out stays."""
        train = (*self.split.train, *other.split.train)
        return Images(
            replace(self.split, train=train),
            Moments(
                torch.cat([self.moments.mean, other.moments.mean]),
                torch.cat([self.moments.logvar, other.moments.logvar]),
            ),
            (*self.geometries, *other.geometries),
        )


def encode_images(frozen: Frozen, data: DataConfig) -> Images:
    """Encode every training picture of `data`.

    Raises:
        DataError: No picture can be decoded, or one cannot and the data is `strict`.
    """
    split = data.split()
    images = encode_examples(frozen, data, split.train)
    unreadable = (*split.unreadable, *images.split.unreadable)
    for path in unreadable:
        log.warning("%s cannot be decoded and is left out", path)
    return replace(images, split=Split(images.split.train, split.held_out, unreadable))


def encode_examples(frozen: Frozen, data: DataConfig, examples: Sequence[Example]) -> Images:
    """Encode pictures that `data` can read, one at a time, so that a row depends on its own bytes alone.

    Raises:
        DataError: As `encode_images`.
    """
    backbone = frozen.backbone
    dtype = next(backbone.vae.parameters()).dtype
    network = frozen.describe(frozen.config.image_files(), dtype)

    def make(i: int) -> Tensors | None:
        try:
            picture = data.read(examples[i])
        except DataError:
            if data.strict:
                raise
            return None
        moments, geometry = backbone.encode_image(picture.pixels), picture.geometry
        sizes = torch.tensor([geometry.original, geometry.crop, geometry.target])
        return {"mean": moments.mean.cpu(), "logvar": moments.logvar.cpu(), "geometry": sizes}

    rows = frozen.share(lambda i: digest("image", examples[i].key, data.transform, network), make, len(examples))
    kept = [(example, row) for example, row in zip(examples, rows, strict=True) if row is not None]
    if not kept:
        raise DataError(f"none of the {len(examples)} training pictures can be decoded; first: {examples[0].path}")
    unreadable = tuple(example.path for example, row in zip(examples, rows, strict=True) if row is None)
    return Images(
        Split(tuple(example for example, _ in kept), (), unreadable),
        Moments(torch.cat([row["mean"] for _, row in kept]), torch.cat([row["logvar"] for _, row in kept])),
        tuple(_geometry(row["geometry"]) for _, row in kept),
    )


def _geometry(sizes: Tensor) -> Geometry:
    height, width, top, left, *target = (int(size) for size in sizes.flatten())
    return Geometry((height, width), (top, left), (target[0], target[1]))


@dataclass(frozen=True)
class Texts:
    """Embeddings of all distinct prompts, in host memory; None is no prompt."""

    rows: Mapping[str | None, int]
    embeddings: TextEmbeddings

    def select(self, prompts: Sequence[str | None]) -> TextEmbeddings:
        """Embeddings of the given prompts."""
        return self.embeddings.select([self.rows[prompt] for prompt in prompts])


def encode_texts(frozen: Frozen, prompts: Iterable[str | None]) -> Texts:
    """Encode every distinct prompt, one at a time, with text encoders that never change."""
    distinct = list(dict.fromkeys(prompts))
    config = frozen.config
    network = digest(frozen.describe(config.text_files(), frozen.backbone.dtype), *config.text_options)

    def make(i: int) -> Tensors:
        text = frozen.backbone.encode_prompts([distinct[i]])
        return {name: value.cpu() for name, value in text.tensors().items()}

    rows = frozen.share(lambda i: digest("text", *_spell(distinct[i]), network), make, len(distinct))
    embeddings = TextEmbeddings.cat([TextEmbeddings(**row) for row in rows if row is not None]).trimmed()
    return Texts({prompt: row for row, prompt in enumerate(distinct)}, embeddings)


def _spell(prompt: str | None) -> tuple[str, ...]:
    return () if prompt is None else (prompt,)
