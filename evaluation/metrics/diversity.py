"""How much pictures of one prompt differ: DreamBooth's DIV (Ruiz et al., 2022, arXiv:2208.12242), by a transformer."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from typing_extensions import override

from evaluation.dino_folder import DinoMetric
from evaluation.metric import Encoders, ImageEncoder, Scorer
from trainers.batch import Source
from trainers.prompt import Request, Sample


class Diversity(DinoMetric):
    """Mean cosine distance, 0 to 2, between a picture and the others of its prompt, over seeds.

    Its mean over a prompt's pictures is the mean over all their pairs. A prompt with one picture has none. The paper
    measures distances by LPIPS: its numbers (0.391 with prior preservation) are on another scale.
    """

    kind: Literal["diversity"] = "diversity"

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        return _DiversityScorer(encoders.dino(self.model))


class _DiversityScorer(Scorer):
    def __init__(self, encoder: ImageEncoder) -> None:
        self.model = encoder.model
        self._encoder = encoder

    @override
    def look(self, samples: Sequence[Sample]) -> Float[np.ndarray, "n k"]:
        return self._encoder.embed_images([sample.image for sample in samples])

    @override
    def judge(self, requests: Sequence[Request], seen: Float[np.ndarray, "n k"]) -> list[float]:
        values = np.full(len(requests), np.nan)
        prompts = np.array([str(request.prompt) for request in requests])
        for prompt in dict.fromkeys(prompts.tolist()):
            (rows,) = np.nonzero(prompts == prompt)
            if len(rows) > 1:
                # The picture itself is among the sum's cosines, and not among the distances.
                similar = (seen[rows] @ seen[rows].sum(axis=0) - (seen[rows] ** 2).sum(axis=1)) / (len(rows) - 1)
                values[rows] = 1 - similar
        return values.tolist()
