"""DINO similarity: raw cosines of class tokens, as in DreamBooth (Ruiz et al., 2022, arXiv:2208.12242)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from typing_extensions import override

from evaluation.dino_folder import DinoMetric
from evaluation.metric import Encoders, ReferenceScorer, Scorer
from trainers.batch import Source


class Dino(DinoMetric):
    """Mean cosine between a picture and every held-out reference, -1 to 1.

    Over a whole panel this is the paper's mean over all generated × real pairs, never a maximum. The paper's numbers
    are of DINO v1's ViT-S/16; the score's model name says which transformer made it, as values of two are not
    comparable.
    """

    kind: Literal["dino"] = "dino"
    needs_references: ClassVar[bool] = True

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        self.require(references)
        return ReferenceScorer(encoders.dino(self.model), references)
