"""What every metric is: a config that opens into a scorer of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float32
from PIL import Image

from trainers.batch import Source
from trainers.config import Choice
from trainers.prompt import Sample


class ImageEncoder(ABC):
    """A tower that maps pictures to unit vectors. Always computes in fp32."""

    model: str
    """Name and content hash of weights, preprocessing and, where there is one, tokenizer."""
    width: int
    """Length of an embedding."""

    @abstractmethod
    def embed_images(self, images: Sequence[Image.Image]) -> Float32[np.ndarray, "n width"]:
        """Embed 8-bit RGB pictures; a picture that was seen before is not computed again."""

    @abstractmethod
    def embed_references(self, sources: Sequence[Source]) -> Float32[np.ndarray, "n width"]:
        """Embed pictures, decoded as training pictures are; once per study."""


class Encoder(ImageEncoder):
    """Two towers that map pictures and prompts to unit vectors of one space."""

    @abstractmethod
    def embed_prompts(self, prompts: Sequence[str]) -> Float32[np.ndarray, "n width"]:
        """Embed prompts, once per study."""


class Encoders(ABC):
    """Every encoder that scoring needs, each opened once however many metrics use it."""

    @abstractmethod
    def clip(self, path: Path, checkpoint: Path | None = None) -> Encoder:
        """The CLIP model in folder `path`, with the weights in `checkpoint` if that is given.

        Raises:
            ModelError: The folder is missing, incomplete, or holds something else.
        """

    @abstractmethod
    def dino(self, path: Path) -> ImageEncoder:
        """The vision transformer in folder `path`.

        Raises:
            ModelError: As `clip`.
        """


class Scorer(ABC):
    """A metric with its models in memory."""

    model: str
    """Name and content hash of whatever makes the numbers."""

    @abstractmethod
    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One raw value per sample; NaN where the metric has none."""


class Metric(Choice):
    """Family of `metrics:` entries."""

    higher_is_better: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False
    """Whether it compares with held-out pictures."""

    @abstractmethod
    def check(self) -> None:
        """Look for every file the metric needs, without torch.

        Raises:
            ModelError: A file is missing or is visibly of another kind; the message says which.
        """

    @abstractmethod
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        """Load models and embed `references`, so that everything that can be wrong is known before any sampling.

        Raises:
            ModelError: A model is missing, broken, or does not fit another one.
            DataError: The metric needs references and there are none, or one cannot be read.
        """
