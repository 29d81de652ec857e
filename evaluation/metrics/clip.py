"""CLIP similarities: raw cosines, as in DreamBooth (Ruiz et al., 2022, arXiv:2208.12242). Never clipped or rescaled."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from typing_extensions import override

from evaluation.clip_folder import read_clip_folder
from evaluation.metric import Encoders, Metric, PromptScorer, ReferenceScorer, Scorer
from trainers.batch import Source
from trainers.config import LocalPath


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
        return PromptScorer(encoders.clip(self.model))


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
        self.require(references)
        return ReferenceScorer(encoders.clip(self.model), references)
