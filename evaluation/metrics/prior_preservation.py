"""Has the class become the subject? DreamBooth's PRES (Ruiz et al., 2022, arXiv:2208.12242)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from typing_extensions import override

from evaluation.dino_folder import DinoMetric
from evaluation.metric import Encoders, ReferenceScorer, Scorer
from trainers.batch import Source


class PriorPreservation(DinoMetric):
    """Mean cosine between a picture of the subject's class and every held-out picture of the subject, -1 to 1.

    Lower is better: a model that forgot its class draws the subject whatever member of the class it is asked for. What
    the untrained model has is as low as it gets. The class's prompts are `evaluate.class_prompts`.
    """

    kind: Literal["prior_preservation"] = "prior_preservation"
    higher_is_better: ClassVar[bool] = False
    needs_references: ClassVar[bool] = True
    of_class: ClassVar[bool] = True

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        self.require(references)
        return ReferenceScorer(encoders.dino(self.model), references)
