"""Pictures of several shapes: each is cut as little as its nearest shape allows, and every batch has one shape."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Self, TypeVar

from pydantic import Field, PositiveInt, model_validator
from typing_extensions import override

from trainers.batch import DataConfig, Example, Picture, shuffled
from trainers.config import Config
from trainers.data.transforms import VERSION, cut_picture, open_picture, upright_size
from trainers.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

E = TypeVar("E", bound=Example)

Size = tuple[int, int]
"""Height and width."""


class BucketsConfig(Config):
    """Shapes of about resolution x resolution pixels, never more, as SDXL was trained on (Podell et al., 2023, app. I).

    A picture goes to the shape whose aspect ratio is nearest to its own, by the ratio of the two.
    """

    step: PositiveInt = 64
    """Sides are multiples of this many pixels."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Of the longest shape; what is longer still is cut to it."""

    def sizes(self, resolution: int) -> tuple[Size, ...]:
        """All shapes, from the widest to the highest; none if the resolution is smaller than a step."""
        found: set[Size] = set()
        for short in range(self.step, resolution + 1, self.step):
            long = resolution**2 // short // self.step * self.step
            if long <= short * self.max_aspect:
                found |= {(short, long), (long, short)}
        return tuple(sorted(found))

    def choose(self, original: Size, resolution: int) -> Size:
        """The shape of a picture of this height and width; of two that are as near, the wider one."""
        wanted = math.log(original[0] / original[1])
        return min(self.sizes(resolution), key=lambda size: abs(math.log(size[0] / size[1]) - wanted))


class CutConfig(DataConfig):
    """Pictures in files of their own, that are turned upright, resized and cut in the middle.

    To a square, so that the short side is `resolution`; or, with `buckets`, to the rectangle nearest to their shape.
    """

    resolution: PositiveInt
    buckets: BucketsConfig | None = None
    """Shapes that pictures are cut to; null is the square alone."""

    @model_validator(mode="after")
    def _buckets_exist(self) -> Self:
        if self.buckets and not self.sizes:
            raise ValueError(
                f"buckets.step is {self.buckets.step} and resolution {self.resolution}; expected no larger a step"
            )
        return self

    @property
    @override
    def size(self) -> Size:
        return self.resolution, self.resolution

    @property
    @override
    def sizes(self) -> Sequence[Size]:
        return self.buckets.sizes(self.resolution) if self.buckets else (self.size,)

    @property
    @override
    def transform(self) -> str:
        return f"{'its shape' if self.buckets else f'square of {self.resolution}'}, bicubic, centred; {VERSION}"

    @override
    def read(self, example: Example) -> Picture:
        return cut_picture(example.path, example.size or self.size)

    @override
    def pick(self, examples: Sequence[Example], seed: int, step: int, position: int, batch_size: int) -> int:
        if self.buckets is None:
            return super().pick(examples, seed, step, position, batch_size)
        return bucket_order(examples).pick(seed, step, position, batch_size)

    def shaped(self, example: E) -> E:
        """With the shape that it is cut to, which is then part of its key."""
        if self.buckets is None:
            return example
        try:
            size = self.buckets.choose(upright_size(example.path), self.resolution)
        except OSError:
            # Whoever decodes it says so.
            size = self.sizes[0]
        key = hashlib.sha256(json.dumps([example.key, *size]).encode()).hexdigest()
        return replace(example, key=key, size=size)

    def readable(self, candidates: Sequence[E], count: int | None = None) -> tuple[tuple[E, ...], tuple[E, ...]]:
        """The first `count` candidates that decode, by default all, and those that were met on the way and do not.

        Raises:
            DataError: The data is strict and one does not decode.
        """
        good: list[E] = []
        bad: list[E] = []
        for example in candidates:
            if len(good) == count:
                break
            try:
                open_picture(example.path)
                good.append(example)
            except DataError:
                if self.strict:
                    raise
                bad.append(example)
        return tuple(good), tuple(bad)


class BucketOrder:
    """An endless stream of examples in which every optimizer step has one shape.

    Each shape has its own stream of permutations, and each step takes the next examples from the shape of an example
    that is drawn for it. In as many steps as there are examples, every example is drawn for one step, so that a shape
    has as many steps as examples and every example is shown as often as a batch is large.
    """

    def __init__(self, examples: Sequence[Example]) -> None:
        import numpy as np

        members: dict[Size | None, list[int]] = {}
        for index, example in enumerate(examples):
            members.setdefault(example.size, []).append(index)
        self._members = list(members.values())
        self._shapes = np.empty(len(examples), np.int64)
        for shape, indices in enumerate(self._members):
            self._shapes[indices] = shape
        self._epoch: tuple[tuple[int, int], np.ndarray] | None = None

    def pick(self, seed: int, step: int, position: int, batch_size: int) -> int:
        """Index of the example at `position` of the stream, at optimizer step `step` of `batch_size` positions."""
        count = len(self._shapes)
        epoch, turn = divmod(step, count)
        shape = int(self._shapes[shuffled(seed, count, step)])
        members = self._members[shape]
        steps_before = epoch * len(members) + int((self._drawn(seed, epoch)[:turn] == shape).sum())
        return members[shuffled(seed, len(members), steps_before * batch_size + position % batch_size)]

    def _drawn(self, seed: int, epoch: int) -> np.ndarray:
        """The shapes of an epoch's steps."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            count = len(self._shapes)
            turns = [shuffled(seed, count, epoch * count + turn) for turn in range(count)]
            self._epoch = (seed, epoch), self._shapes[turns]
        return self._epoch[1]


class _Listed:
    """Examples, equal to themselves alone and so quickly looked up."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Listed) and other.examples is self.examples

    @override
    def __hash__(self) -> int:
        return id(self.examples)


def bucket_order(examples: Sequence[Example]) -> BucketOrder:
    """The order of these examples, made once."""
    return _order(_Listed(examples))


@lru_cache(maxsize=2)
def _order(listed: _Listed) -> BucketOrder:
    return BucketOrder(listed.examples)
