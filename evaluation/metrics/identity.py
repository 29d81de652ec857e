"""Faces: whether one was drawn, and whether it is that of the prompt's photo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32
from typing_extensions import override

import trainers.faces  # noqa: F401  # pyright: ignore[reportUnusedImport]  registers the kinds
from evaluation.metric import Encoders, Metric, PictureScorer, Scorer
from trainers.batch import Source
from trainers.data.transforms import open_picture
from trainers.errors import DataError
from trainers.face import FaceConfig, FaceEmbedder
from trainers.prompt import Box, Prompt, Sample


class Identity(Metric):
    """Cosine of the face in a picture and the face in its prompt's photo, -1 to 1, by a face embedder.

    It has no value for a picture without a face, and none for a prompt without a photo; both are counted.
    """

    kind: Literal["identity"] = "identity"
    faces: FaceConfig
    """Another one than training looks at gives an independent opinion."""

    @override
    def check(self) -> None:
        self.faces.check()

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        self.check()
        return _IdentityScorer(encoders.faces(self.faces), _name(self.faces))


class FaceFound(Metric):
    """Whether a face is found in a picture, 1 or 0; its mean is the share of pictures with a face.

    Beside `identity`, which says nothing of pictures without one: a trial whose few recognisable faces are right is not
    a good one.
    """

    kind: Literal["face_found"] = "face_found"
    faces: FaceConfig

    @override
    def check(self) -> None:
        self.faces.check()

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        self.check()
        return _FaceFoundScorer(encoders.faces(self.faces), _name(self.faces))


def _name(config: FaceConfig) -> str:
    from trainers.cache import hash_file

    hashes = [hash_file(file) for file in config.files()]
    return f"{type(config).model_fields['kind'].default}@{'-'.join(found[:12] for found in hashes)}"


class _FaceFoundScorer(PictureScorer):
    def __init__(self, embedder: FaceEmbedder, model: str) -> None:
        self.model = model
        self._embedder = embedder

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        return [float(self._embedder.find(sample.image) is not None) for sample in samples]


class _IdentityScorer(PictureScorer):
    def __init__(self, embedder: FaceEmbedder, model: str) -> None:
        self.model = model
        self._embedder = embedder
        self._known: dict[tuple[Path, Box | None], Float32[np.ndarray, " n"]] = {}

    @override
    def values(self, samples: Sequence[Sample]) -> list[float]:
        return [self._value(sample) for sample in samples]

    def _value(self, sample: Sample) -> float:
        if sample.prompt.image is None:
            return float("nan")
        wanted = self._reference(sample.prompt, sample.prompt.image)
        face = self._embedder.find(sample.image)
        return float("nan") if face is None else float(_unit(face.embedding.numpy()) @ wanted)

    def _reference(self, prompt: Prompt, path: Path) -> Float32[np.ndarray, " n"]:
        key = (path, prompt.image_box)
        if key not in self._known:
            face = self._embedder.find(open_picture(path), prompt.image_box)
            if face is None:
                raise DataError(f"{path}: no face found; the prompt {str(prompt)!r} cannot be judged by it")
            self._known[key] = _unit(face.embedding.numpy())
        return self._known[key]


def _unit(vector: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, " n"]:
    return vector / np.linalg.norm(vector)
