"""Tar shards in the WebDataset format, read at random."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import tarfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast

import braceexpand
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from typing_extensions import override

from trainers.batch import DataConfig, Example, Picture, Split
from trainers.config import Config, LocalPath
from trainers.data.crops import CENTRED, CentreCrop, Crop
from trainers.data.manifests import ManifestsConfig
from trainers.data.mixing import MixConfig, Mixer
from trainers.data.shard_index import Layout, Sample, decode_images, hash_images, index_shard
from trainers.data.transforms import VERSION, cut_picture
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ShardExample(Example):
    """A square of a picture in a shard; `path` names the picture as if the shard were a folder."""

    sample: Sample
    sha256: str
    """Of the picture's bytes."""
    variant: int
    """Which of the picture's squares."""

    @override
    def read_bytes(self) -> bytes:
        return self.sample.image.read_bytes()


class AestheticConfig(Config):
    """Where the metadata say how beautiful a picture is."""

    field: str = "ae_aesthetic"
    maximum: PositiveFloat = 100.0
    """The field's largest value, which stands for 10 points; 0 is 0 points."""


class ShardsConfig(DataConfig):
    """Local tar files of samples: a picture, a caption and, usually, metadata that share a name.

    Shards are indexed once; after that, examples are read at random, so an epoch is a permutation of all of them, on
    any number of processes and whether or not training was interrupted, and nothing has to be resampled or buffered.
    """

    kind: Literal["shards"] = "shards"
    train: LocalPath
    """Path of the shards, with braces for several: train-{00000..00015}.tar."""
    validation: LocalPath | None = None
    """Shards that are held out; their squares are centred."""
    resolution: PositiveInt
    image_key: str = "jpg;jpeg;png;webp"
    """Suffixes of the picture's member; the first that a sample has counts."""
    caption_key: str = "txt"
    meta_key: str | None = "json"
    """Suffix of the metadata; null reads none."""
    crop: Crop = CentreCrop()
    mix: MixConfig | None = None
    """How often which classes are shown; null shows every example once an epoch."""
    aesthetic: AestheticConfig | None = None
    """The score that a refiner is told of; null tells it the same of all pictures."""
    manifests: ManifestsConfig | None = None
    max_corrupt: NonNegativeFloat = 0.0
    """Samples that may be left out because a member is missing or cannot be read: a share if below 1, else a number.
    They are counted and reported."""

    @model_validator(mode="after")
    def _options_fit(self) -> Self:
        if self.strict and self.max_corrupt:
            raise ValueError("strict data has no corrupt samples; set max_corrupt to 0, or strict to false")
        if self.max_corrupt > 1 and self.max_corrupt % 1:
            raise ValueError(f"max_corrupt is {self.max_corrupt}; expected a share below 1, or a whole number")
        if self.meta_key is None and (self.mix or self.aesthetic):
            raise ValueError("mix and aesthetic are decided by metadata; set meta_key, or remove them")
        if self.manifests and self.manifests.validation_ids and not self.validation:
            raise ValueError("manifests.validation_ids are given and validation is not; add or remove one")
        return self

    @property
    @override
    def size(self) -> tuple[int, int]:
        return self.resolution, self.resolution

    @property
    @override
    def transform(self) -> str:
        return f"square of {self.resolution}, bicubic, {self.crop.description}; {VERSION}"

    @override
    def check(self) -> None:
        train, validation = (self._list(shards, decode=self.strict) for shards in self._shards())
        self._refuse((*train, *validation))
        if self.manifests:
            self.manifests.check(
                {"train": [sample.id for sample in train], "validation": [sample.id for sample in validation]},
                dict(zip(("train", "validation"), self._shards(), strict=True)),
            )
        if self.mix:
            Mixer(self.mix, [sample.classes for sample in train if not sample.problem])

    @override
    def check_validation(self) -> None:
        if self.validation is None:
            raise ValueError("validation needs captioned pictures that are held out; set data.validation")

    @override
    def split(self) -> Split:
        shards = self._shards()
        # A held-out picture is decoded now: it is judged by after training, which is late to learn that it cannot be.
        train, validation = self._list(shards[0], decode=self.strict), self._list(shards[1], decode=True)
        self._refuse((*train, *validation))
        hashes = {shard: hash_images(shard, self._layout) for shard in {*shards[0], *shards[1]}}

        def examples(samples: Sequence[Sample], variants: Sequence[int]) -> list[ShardExample]:
            usable = [sample for sample in samples if not sample.problem]
            return [
                self._example(sample, hashes[sample.image.shard][sample.image.name], variant)
                for sample in usable
                for variant in variants
            ]

        held_out = examples(validation, (CENTRED,))
        hidden = {example.sha256 for example in held_out}
        listed = examples(train, self.crop.shown)
        kept = tuple(example for example in listed if example.sha256 not in hidden)
        if len(kept) < len(listed):
            log.warning("%s: %d examples are held out and not trained on", self.train, len(listed) - len(kept))
        if not kept:
            raise DataError(f"{self.train}: no sample to train on; expected some that are not held out")
        bad = [sample for sample in (*train, *validation) if sample.problem]
        if bad:
            log.warning("%d samples cannot be used and are left out; the first: %s", len(bad), bad[0])
        return Split(kept, tuple(held_out), tuple(sample.image.path for sample in bad))

    @override
    def read(self, example: Example) -> Picture:
        shown = cast("ShardExample", example)
        place = partial(self.crop.place, shown.sample.id, shown.variant, self.resolution)
        picture = cut_picture(shown, self.size, place)
        if shown.sample.aesthetic is None:
            return picture
        return replace(picture, geometry=replace(picture.geometry, aesthetic=shown.sample.aesthetic))

    @override
    def pick(self, examples: Sequence[Example], seed: int, step: int, position: int, batch_size: int) -> int:
        if self.mix is None:
            return super().pick(examples, seed, step, position, batch_size)
        return _mixer(_Stream(self.mix, cast("Sequence[ShardExample]", examples))).pick(seed, step, position)

    @property
    def _layout(self) -> Layout:
        return Layout(
            image=tuple(self.image_key.lower().split(";")),
            caption=self.caption_key.lower(),
            meta=self.meta_key.lower() if self.meta_key else None,
            classes=self.mix.field if self.mix else None,
            aesthetic=self.aesthetic.field if self.aesthetic else None,
        )

    def _shards(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        return _expand(self.train), _expand(self.validation) if self.validation else ()

    def _list(self, shards: Sequence[Path], *, decode: bool) -> tuple[Sample, ...]:
        look = decode_images if decode else index_shard
        samples = [sample for shard in shards for sample in look(shard, self._layout)]
        return tuple(self._judge(sample) for sample in samples) if self.aesthetic else tuple(samples)

    def _judge(self, sample: Sample) -> Sample:
        """With the aesthetic score in points of ten."""
        assert self.aesthetic is not None
        value, maximum = sample.aesthetic, self.aesthetic.maximum
        if value is None or sample.problem:
            return sample
        if not 0 <= value <= maximum:
            return replace(sample, problem=f"{self.aesthetic.field} is {value}; expected 0 to {maximum:g}")
        return replace(sample, aesthetic=10 * value / maximum)

    def _example(self, sample: Sample, sha256: str, variant: int) -> ShardExample:
        # What decides about pixels and geometry, besides `transform`: a file's bytes alone, where nothing else does.
        decisive = [] if variant == CENTRED else [sample.id, variant]
        decisive += [] if sample.aesthetic is None else ["aesthetic", sample.aesthetic]
        key = hashlib.sha256(json.dumps([sha256, *decisive]).encode()).hexdigest() if decisive else sha256
        return ShardExample(key, sample.image.path, sample.caption, sample=sample, sha256=sha256, variant=variant)

    @override
    def check_unreadable(self, unreadable: Sequence[Path]) -> None:
        samples = [sample for shards in self._shards() for sample in self._list(shards, decode=False)]
        self._limit(list(unreadable), len(samples))

    def _refuse(self, samples: Sequence[Sample]) -> None:
        if not samples:
            raise DataError(f"{self.train}: no samples; expected members such as 000.jpg, 000.txt and 000.json")
        self._limit([sample for sample in samples if sample.problem], len(samples))

    def _limit(self, bad: Sequence[object], count: int) -> None:
        limit = self.max_corrupt if self.max_corrupt >= 1 else self.max_corrupt * count
        if len(bad) > limit:
            raise DataError(
                f"{bad[0]}; {len(bad)} of {count} samples cannot be used and {int(limit)} may be left out; repair the "
                "shards or raise max_corrupt"
            )


def _expand(pattern: Path) -> tuple[Path, ...]:
    try:
        shards = tuple(Path(name) for name in braceexpand.braceexpand(str(pattern)))
    except ValueError as error:
        raise DataError(f"{pattern}: {error}; expected a path such as /data/train-{{00000..00015}}.tar") from error
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(f"{missing[0]}: no such file; {len(missing)} of the {len(shards)} shards {pattern} are missing")
    return shards


class _Stream:
    """Examples and how they are mixed; equal to itself alone, and so quickly looked up."""

    def __init__(self, mix: MixConfig, examples: Sequence[ShardExample]) -> None:
        self.mix, self.examples = mix, examples

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stream) and other.mix is self.mix and other.examples is self.examples

    @override
    def __hash__(self) -> int:
        return id(self.examples)


@functools.lru_cache(maxsize=2)
def _mixer(stream: _Stream) -> Mixer:
    return Mixer(stream.mix, [example.sample.classes for example in stream.examples])


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
    """Write samples, each a name and its members by suffix, as a shard; equal samples give equal files."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, members in samples:
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{name}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
