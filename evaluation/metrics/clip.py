"""CLIP similarities: raw cosines, as in DreamBooth (Ruiz et al., 2022, arXiv:2208.12242). Never clipped or rescaled."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float32
from typing_extensions import override

from evaluation.clip_folder import read_clip_folder
from evaluation.metric import Encoder, Encoders, Metric, Scorer
from trainers.batch import Source
from trainers.config import LocalPath
from trainers.errors import DataError
from trainers.prompt import Sample


class ClipText(Metric):
    """Cosine between a picture and its full prompt, or what that says the picture `shows` ("CLIP-T")."""

    kind: Literal["clip_text"] = "clip_text"
    model: LocalPath
    """Folder of a CLIP model, in the form of open_clip or of transformers."""

    @override
    def check(self) -> None:
        read_clip_folder(self.model)

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        return _TextScorer(encoders.clip(self.model))


class _TextScorer(Scorer):
    def __init__(self, encoder: Encoder) -> None:
        self.model = encoder.model
        self._encoder = encoder

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        images = self._encoder.embed_images([sample.image for sample in samples])
        prompts = self._encoder.embed_prompts([sample.prompt.shows or sample.prompt.text for sample in samples])
        return (images * prompts).sum(axis=1).tolist()


class ClipImage(Metric):
    """Mean cosine between a picture and every held-out reference ("CLIP-I").

    Over a whole panel this is the paper's mean over all generated × real pairs; a maximum over references would
    reward copying one of them.
    """

    kind: Literal["clip_image"] = "clip_image"
    needs_references: ClassVar[bool] = True
    model: LocalPath
    """Folder of a CLIP model, in the form of open_clip or of transformers."""

    @override
    def check(self) -> None:
        read_clip_folder(self.model)

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        if not references:
            raise DataError(
                "metric clip_image compares samples with held-out pictures; got none: "
                "set `data.holdout` (or `data.holdout_path`) or remove the metric"
            )
        encoder = encoders.clip(self.model)
        return _ImageScorer(encoder, encoder.embed_references(references))


class _ImageScorer(Scorer):
    def __init__(self, encoder: Encoder, references: Float32[np.ndarray, "n width"]) -> None:
        self.model = encoder.model
        self._encoder = encoder
        self._references = references

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        images = self._encoder.embed_images([sample.image for sample in samples])
        return (images @ self._references.T).mean(axis=1).tolist()
