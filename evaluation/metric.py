"""What every metric is: a config that opens into a scorer of pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32
from PIL import Image
from typing_extensions import override

from trainers.batch import Source
from trainers.config import Choice
from trainers.errors import DataError
from trainers.face import FaceConfig, FaceEmbedder
from trainers.prompt import Request, Sample


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

    @abstractmethod
    def faces(self, config: FaceConfig) -> FaceEmbedder:
        """The face embedder that `config` asks for; a picture that was seen before is not looked at again.

        Raises:
            ModelError: Weights or a package are missing.
        """


class Scorer(ABC):
    """A metric with its models in memory. It looks at pictures as they come by, and judges when all were seen."""

    model: str
    """Name and content hash of whatever makes the numbers."""

    @abstractmethod
    def look(self, samples: Sequence[Sample]) -> Float[np.ndarray, "n k"]:
        """What is remembered of each of one or more pictures; it depends on nothing but the picture and its prompt."""

    @abstractmethod
    def judge(self, requests: Sequence[Request], seen: Float[np.ndarray, "n k"]) -> list[float]:
        """One raw value for each picture of the whole panel, of which `seen` is remembered; NaN where there is none."""

    def values(self, samples: Sequence[Sample]) -> list[float]:
        """The same for a panel that is at hand in one piece."""
        return self.judge([Request(sample.prompt, sample.seed) for sample in samples], self.look(samples))


class PictureScorer(Scorer):
    """A scorer whose value of a picture has nothing to do with other pictures."""

    @abstractmethod
    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        """One raw value per sample; NaN where the metric has none."""

    @override
    def look(self, samples: Sequence[Sample]) -> Float[np.ndarray, "n 1"]:
        return np.array(self.values(samples), np.float64)[:, None]

    @override
    def judge(self, requests: Sequence[Request], seen: Float[np.ndarray, "n 1"]) -> list[float]:
        return seen[:, 0].tolist()


class PromptScorer(PictureScorer):
    """Cosine between a picture and its full prompt, or what that says the picture `shows`; never clipped."""

    def __init__(self, encoder: Encoder) -> None:
        self.model = encoder.model
        self._encoder = encoder

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        images = self._encoder.embed_images([sample.image for sample in samples])
        prompts = self._encoder.embed_prompts([sample.prompt.shows or sample.prompt.text for sample in samples])
        return (images * prompts).sum(axis=1).tolist()


class ReferenceScorer(PictureScorer):
    """Mean cosine between a picture and every reference.

    Over a whole panel this is DreamBooth's mean over all generated x real pairs (Ruiz et al., 2022, arXiv:2208.12242);
    a maximum over references would reward copying one of them.
    """

    def __init__(self, encoder: ImageEncoder, references: Sequence[Source]) -> None:
        self.model = encoder.model
        self._encoder = encoder
        self._references = encoder.embed_references(references)

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        images = self._encoder.embed_images([sample.image for sample in samples])
        return (images @ self._references.T).mean(axis=1).tolist()


class Metric(Choice):
    """Family of `metrics:` entries."""

    higher_is_better: ClassVar[bool] = True
    needs_references: ClassVar[bool] = False
    """Whether it compares with held-out pictures."""
    of_class: ClassVar[bool] = False
    """Whether it judges the pictures of `class_prompts`, and no others."""

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

    def require(self, references: Sequence[Source]) -> None:
        """Refuse to compare with nothing.

        Raises:
            DataError: There are no references.
        """
        if not references:
            raise DataError(
                f"metric {self.model_dump()['kind']} compares samples with held-out pictures; got none: "
                "set `data.holdout` (or `data.holdout_path`) or remove the metric"
            )
