"""What data sources yield: examples, the pictures behind them, and the rows of one forward pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from trainers.config import Choice

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch
    from jaxtyping import Float
    from torch import Tensor


class Stream(IntEnum):
    """What a random number of an example is for."""

    VAE = 0
    NOISE = 1
    TIMESTEP = 2
    DROPOUT = 3
    ORDER = 4
    LAYERS = 5
    OFFSET = 6
    REFERENCE = 7


def example_rng(seed: int, step: int, place: int, stream: Stream) -> torch.Generator:
    """Randomness of one use of one row of one step's global batch, on the CPU.

    It depends on nothing else: not on ranks, micro-batches, or whether training was interrupted.
    """
    import numpy as np
    import torch

    state = np.random.SeedSequence((seed, step, place, stream)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def init_seed(seed: int, network: int) -> int:
    """Seed of the initial weights that are added to network number `network`."""
    import numpy as np

    return int(np.random.SeedSequence((seed, network)).generate_state(1, np.uint64)[0])


def shuffled(seed: int, count: int, position: int) -> int:
    """What stands at `position` of an endless stream of numbers below `count`: every epoch is a permutation."""
    return int(_permutation(seed, count, position // count)[position % count])


@lru_cache(maxsize=4)
def _permutation(seed: int, count: int, epoch: int) -> Any:
    import numpy as np

    return np.random.default_rng(np.random.SeedSequence((seed, epoch, Stream.ORDER))).permutation(count)


AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5
"""What the stock refiner pipeline asks for, and what guidance leads away from."""


@runtime_checkable
class Source(Protocol):
    """Where a picture's bytes are: a path, or an example; `str()` names it."""

    def read_bytes(self) -> bytes:
        """The whole file.

        Raises:
            OSError: It cannot be read.
        """
        ...


@dataclass(frozen=True)
class Example:
    """One training picture as a data source lists it; no pixels yet."""

    key: str
    """sha256 of the file's bytes, and of whatever else decides what `DataConfig.read` makes of them."""
    path: Path
    """Names the picture; it is a file unless a kind of example says otherwise."""
    prompt: str
    size: tuple[int, int] | None = None
    """Height and width that it is cut to, where examples differ; null is the data's."""

    def read_bytes(self) -> bytes:
        """The picture's file.

        Raises:
            OSError: It cannot be read.
        """
        return self.path.read_bytes()

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class Geometry:
    """What SDXL is told about a picture's size, all as (height, width) or (top, left)."""

    original: tuple[int, int]
    """Size of the upright picture before it was resized."""
    crop: tuple[int, int]
    """Where the crop begins, in pixels of the resized picture (as in diffusers' trainer)."""
    target: tuple[int, int]
    """Size of the crop."""
    aesthetic: float = AESTHETIC
    """How beautiful the picture is, from 0 to 10; the refiner alone is told."""

    @classmethod
    def whole(cls, height: int, width: int) -> Geometry:
        """A picture that is wanted whole: what the stock pipeline asks for when it samples."""
        return cls((height, width), (0, 0), (height, width))


@dataclass(frozen=True)
class Picture:
    """A decoded training picture."""

    pixels: Float[Tensor, "1 3 h w"]
    """In [-1, 1]."""
    geometry: Geometry


@dataclass(frozen=True)
class Batch:
    """Rows of one optimizer step's global batch that one forward pass sees."""

    step: int
    """Optimizer step, from 0."""
    places: tuple[int, ...]
    """Each row's place in the global batch. With `step` and the trial's seed it determines all that is drawn."""
    indices: tuple[int, ...]
    """Each row's index into the method's examples, and beyond them into what is held out."""
    levels: tuple[float, ...] | None = None
    """In validation, where each row stands among the noise levels of training, from 0 to 1; nothing is dropped then.
    None is training: noise levels are drawn."""


@dataclass(frozen=True)
class Split:
    """The examples to train on, and those to judge fidelity by."""

    train: tuple[Example, ...]
    held_out: tuple[Example, ...]
    unreadable: tuple[Path, ...] = ()
    """Files that could not be decoded when the held-out pictures were chosen."""


class DataConfig(Choice):
    """Where training pictures come from."""

    strict: bool = False
    """Whether a picture that cannot be decoded is an error, found before a study starts; otherwise it is left out,
    counted and reported."""

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Height and width of every picture that `read` returns, or, where they differ, of a square one."""

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """Height and width of all pictures that `read` may return; of more than one, a batch has one."""
        return (self.size,)

    @abstractmethod
    def check(self) -> None:
        """Find what is wrong with the data without decoding a picture and without torch.

        Raises:
            DataError: Pictures or captions are missing, or too few.
        """

    @abstractmethod
    def split(self) -> Split:
        """List the examples; which of them are held out depends on contents alone."""

    @abstractmethod
    def read(self, example: Example) -> Picture:
        """Decode one example.

        Raises:
            DataError: The file cannot be decoded.
        """

    def check_validation(self) -> None:
        """Raise ValueError if no captioned examples are held out: there is nothing to evaluate a loss on."""

    def pick(self, examples: Sequence[Example], seed: int, step: int, position: int, batch_size: int) -> int:  # noqa: ARG002
        """Index of the example at `position` of an endless stream, at optimizer step `step` of `batch_size` positions.

        A function of its arguments alone, so that neither resuming nor the number of processes changes what is seen.
        Every epoch is a permutation, unless a kind says otherwise.
        """
        return shuffled(seed, len(examples), position)

    def check_unreadable(self, unreadable: Sequence[Path]) -> None:
        """Raise DataError if so many pictures had to be left out that something is wrong; most kinds only count."""

    @property
    @abstractmethod
    def transform(self) -> str:
        """Names everything that `read` does to a file's bytes: two equal names give equal pixels."""
