"""What data sources yield: examples, the pictures behind them, and the rows of one forward pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.config import Choice

if TYPE_CHECKING:
    from pathlib import Path

    from jaxtyping import Float
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """One training picture as a data source lists it; no pixels yet."""

    key: str
    """sha256 of the file's bytes."""
    path: Path
    prompt: str
    weight: float = 1.0
    """Factor of this example's loss."""


@dataclass(frozen=True)
class Geometry:
    """What SDXL is told about a picture's size, all as (height, width) or (top, left)."""

    original: tuple[int, int]
    """Size of the upright picture before it was resized."""
    crop: tuple[int, int]
    """Where the crop begins, in pixels of the resized picture (as in diffusers' trainer)."""
    target: tuple[int, int]
    """Size of the crop."""

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
    """Each row's index into the method's list of examples."""


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
        """Height and width of every picture that `read` returns."""

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

    @property
    @abstractmethod
    def transform(self) -> str:
        """Names everything that `read` does to a file's bytes: two equal names give equal pixels."""
