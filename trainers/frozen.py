"""Frozen work done once: moments of all pictures and embeddings of all prompts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.backbone import Backbone, BackboneConfig, Moments, TextEmbeddings
from trainers.batch import DataConfig, Example, Geometry, Split
from trainers.cache import Cache, Tensors, digest
from trainers.errors import DataError
from trainers.packing import fits, load_packed, pack

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_SILENCE = 30.0
"""Seconds after which it is said how far long work is."""


def told(items: Iterable[_T], what: str, count: int) -> Iterator[_T]:
    """The items, saying now and then how many of `count` there were."""
    said = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - said >= _SILENCE:
            log.info("%s: %d of %d", what, done, count)
            said = time.monotonic()
        yield item


@dataclass(frozen=True)
class Frozen:
    """Where frozen work happens: a model, an optional cache, and the processes that share the work."""

    config: BackboneConfig
    backbone: Backbone
    cache: Cache | None
    accelerator: Accelerator

    def share(
        self, what: str, key: Callable[[int], str], make: Callable[[int], Tensors | None], count: int
    ) -> list[Tensors | None]:
        """`make(i)` for every i below `count`, through the cache: each process makes its share of what is missing.

        `what` it is, the log says while it takes long.
        """
        if self.cache is not None and self.accelerator.num_processes > 1:
            self._make_share(what, key, make, count)
            self.accelerator.wait_for_everyone()
        return [self._recall(key, make, i) for i in told(range(count), what, count)]

    def stack(
        self, what: str, key: Callable[[int], str], make: Callable[[int], Tensors | None], count: int
    ) -> tuple[list[int], Tensors]:
        """As `share`, for rows of equal shapes: numbers of those that there are, and each tensor of all of them.

        What memory has no room for is mapped from files in the cache.
        """
        first = next((row for i in range(count) if (row := self._recall(key, make, i)) is not None), None)
        if self.cache is not None and first is not None and not fits(first, count):
            return self._packed(self.cache.folder(digest("rows", *map(key, range(count)))), what, key, make, count)
        rows = self.share(what, key, make, count)
        found = [row for row in rows if row is not None]
        kept = [i for i, row in enumerate(rows) if row is not None]
        return kept, {name: torch.cat([row[name] for row in found]) for name in found[0]} if found else {}

    def _packed(
        self, folder: Path, what: str, key: Callable[[int], str], make: Callable[[int], Tensors | None], count: int
    ) -> tuple[list[int], Tensors]:
        if load_packed(folder) is None:
            self._make_share(what, key, make, count)
        # Whoever has nothing to make waits, too: another study may have packed the folder in between.
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_local_main_process and load_packed(folder) is None:
            pack(folder, (self._recall(key, make, i) for i in range(count)))
        self.accelerator.wait_for_everyone()
        found = load_packed(folder)
        assert found is not None
        return found

    def _make_share(
        self, what: str, key: Callable[[int], str], make: Callable[[int], Tensors | None], count: int
    ) -> None:
        mine = range(self.accelerator.process_index, count, self.accelerator.num_processes)
        for i in told(mine, what, len(mine)):
            self._recall(key, make, i)

    def _recall(self, key: Callable[[int], str], make: Callable[[int], Tensors | None], i: int) -> Tensors | None:
        if self.cache is None:
            return make(i)
        found = self.cache.get(key(i))
        if found is None and (found := make(i)) is not None:
            self.cache.put(key(i), found)
        return found

    def describe(self, files: Iterable[Path], dtype: torch.dtype) -> str:
        """Everything besides the input that determines what a frozen network of `files` answers."""
        model = self.cache.hash_files(files) if self.cache else ""
        return digest(model, str(dtype), self.backbone.device.type, torch.__version__)


@dataclass(frozen=True)
class Images:
    """Pictures as the denoiser needs them, in host memory or mapped to it; row i is `split.train[i]`.

    After those come the rows of `split.held_out`, if they were asked for.
    """

    split: Split
    """What was asked for, less the pictures that cannot be decoded."""
    moments: Moments
    geometries: tuple[Geometry, ...]
    grids: tuple[tuple[int, int], ...] | None = None
    """Height and width of each row's latents, where they differ: `moments` are then [rows, channels, cells], with room
    for the most cells that there may be. Null where all have one shape."""

    def select(self, indices: Sequence[int], device: torch.device) -> Moments:
        """Moments of the given rows, which have one shape, on `device`."""
        rows = list(indices)
        mean, logvar = (value[rows].to(device, non_blocking=True) for value in (self.moments.mean, self.moments.logvar))
        if self.grids is None:
            return Moments(mean, logvar)
        (grid,) = {self.grids[row] for row in rows}
        shape, cells = (*mean.shape[:2], *grid), math.prod(grid)
        return Moments(mean[..., :cells].reshape(shape), logvar[..., :cells].reshape(shape))

    def first(self, count: int) -> Images:
        """The first `count` rows, of pictures of one shape."""
        moments = Moments(self.moments.mean[:count], self.moments.logvar[:count])
        return Images(replace(self.split, train=self.split.train[:count]), moments, self.geometries[:count])

    def joined(self, other: Images) -> Images:
        """These training pictures, then those of `other`, then what these have behind theirs; all of one shape."""
        own, added = len(self.split.train), len(other.split.train)

        def join(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.cat([mine[:own], theirs[:added], mine[own:]])

        return Images(
            replace(self.split, train=(*self.split.train, *other.split.train)),
            Moments(
                join(self.moments.mean, other.moments.mean),
                join(self.moments.logvar, other.moments.logvar),
            ),
            (*self.geometries[:own], *other.geometries[:added], *self.geometries[own:]),
        )


def encode_images(frozen: Frozen, data: DataConfig, *, held_out: bool = False) -> Images:
    """Encode every training picture of `data` and, if asked for, those that are held out.

    Raises:
        DataError: No picture can be decoded, or one cannot and the data is `strict`.
    """
    split = data.split()
    judged = split.held_out if held_out else ()
    images = encode_examples(frozen, data, (*split.train, *judged))
    lost = {example.path for example in judged} & set(images.split.unreadable)
    if lost:
        raise DataError(f"{min(lost)}: held out and cannot be read; remove it")
    # An example may be one of several of one picture.
    unreadable = tuple(dict.fromkeys((*split.unreadable, *images.split.unreadable)))
    for path in unreadable:
        log.warning("%s cannot be used and is left out", path)
    data.check_unreadable(unreadable)
    train = images.split.train[: len(images.split.train) - len(judged)]
    if not train:
        raise DataError(f"none of {len(split.train)} training pictures can be decoded; first: {split.train[0].path}")
    return replace(images, split=Split(train, split.held_out, unreadable))


def encode_examples(frozen: Frozen, data: DataConfig, examples: Sequence[Example]) -> Images:
    """Encode pictures that `data` can read, one at a time, so that a row depends on its own bytes alone.

    Raises:
        DataError: As `encode_images`.
    """
    backbone = frozen.backbone
    dtype = next(backbone.vae.parameters()).dtype
    network = frozen.describe(frozen.config.image_files(), dtype)
    grids = [backbone.latent_shape(*size)[1:] for size in data.sizes]
    cells = max(map(math.prod, grids)) if len(grids) > 1 else None

    def make(i: int) -> Tensors | None:
        try:
            picture = data.read(examples[i])
        except DataError:
            if data.strict:
                raise
            return None
        moments, geometry = backbone.encode_image(picture.pixels), picture.geometry
        told = [[*geometry.original, *geometry.crop, *geometry.target, geometry.aesthetic]]
        if cells is not None:
            moments = Moments(_flat(moments.mean, cells), _flat(moments.logvar, cells))
        row = {"mean": moments.mean, "logvar": moments.logvar, "told": torch.tensor(told, dtype=torch.float64)}
        return {name: value.cpu() for name, value in row.items()}

    room = () if cells is None else (str(cells),)
    kept, columns = frozen.stack(
        "pictures", lambda i: digest("picture", examples[i].key, data.transform, network, *room), make, len(examples)
    )
    if not kept:
        raise DataError(f"none of the {len(examples)} training pictures can be decoded; first: {examples[0].path}")
    left_out = sorted(set(range(len(examples))) - set(kept))
    geometries = tuple(_geometry(row) for row in cast("list[list[float]]", columns["told"].tolist()))
    return Images(
        Split(tuple(examples[i] for i in kept), (), tuple(examples[i].path for i in left_out)),
        Moments(columns["mean"], columns["logvar"]),
        geometries,
        None if cells is None else tuple(backbone.latent_shape(*one.target)[1:] for one in geometries),
    )


def _flat(value: Tensor, cells: int) -> Tensor:
    """Latents [1, channels, h, w] as [1, channels, cells], zeros behind."""
    return torch.nn.functional.pad(value.flatten(2), (0, cells - math.prod(value.shape[2:])))


def _geometry(told: Sequence[float]) -> Geometry:
    height, width, top, left, bottom, right = (int(size) for size in told[:6])
    return Geometry((height, width), (top, left), (bottom, right), told[6])


@dataclass(frozen=True)
class Texts:
    """Embeddings of all distinct prompts, in host memory or mapped to it; None is no prompt."""

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

    _, columns = frozen.stack("prompts", lambda i: digest("text", *_spell(distinct[i]), network), make, len(distinct))
    embeddings = TextEmbeddings(**columns)
    if fits(embeddings.select([0]).tensors(), len(distinct)):
        embeddings = embeddings.trimmed()
    return Texts({prompt: row for row, prompt in enumerate(distinct)}, embeddings)


def _spell(prompt: str | None) -> tuple[str, ...]:
    return () if prompt is None else (prompt,)
