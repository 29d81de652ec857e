"""The interface of a face embedder: where a picture's face is, and whose it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.config import Choice

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

    from trainers.prompt import Box


@dataclass(frozen=True)
class Face:
    """One face of a picture."""

    embedding: Float[Tensor, " n"]
    """Whose it is: float32, on the CPU, not normalised. Faces of one person point the same way."""
    box: Box
    """Where it is."""


class FaceEmbedder(ABC):
    """A face detector and recogniser, ready to run."""

    size: int
    """Numbers in an embedding."""

    @abstractmethod
    def find(self, image: Image.Image, box: Box | None = None) -> Face | None:
        """A face of a picture; None if there is none, which callers count and report: it is never a vector of zeros.

        Args:
            image: RGB.
            box: Where the face is meant to be: the face that overlaps it most is returned. Without it, the largest.
        """


class FaceConfig(Choice):
    """Which face embedder, and where its weights are."""

    @abstractmethod
    def check(self) -> None:
        """Look for what is needed, without torch.

        Raises:
            ModelError: Weights or a package are missing.
        """

    @abstractmethod
    def files(self) -> tuple[Path, ...]:
        """Files that determine what it answers."""

    @abstractmethod
    def open(self, device: torch.device) -> FaceEmbedder:
        """Load the weights.

        Raises:
            ModelError: As `check`.
        """


def overlap(first: Box, second: Box) -> int:
    """Pixels that two boxes share."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(0, width) * max(0, height)


def area(box: Box) -> int:
    """Pixels of a box."""
    return overlap(box, box)
