"""What people prefer: HPSv2 and HPSv2.1 (Wu et al., 2023, arXiv:2306.09341), a CLIP fine-tuned on people's choices."""

from collections.abc import Sequence
from typing import Literal

from typing_extensions import override

from evaluation.clip_folder import read_clip_folder
from evaluation.metric import Encoders, Metric, PromptScorer, Scorer
from trainers.batch import Source
from trainers.config import LocalPath


class Preference(Metric):
    """Cosine between a picture and its full prompt, or what that says the picture `shows`, by a preference model.

    The raw cosine, about 0.2 to 0.35 for HPSv2.1, whose tables show it times 100. Differences between pictures of one
    prompt are what the model was trained on; between prompts, they mean little.
    """

    kind: Literal["preference"] = "preference"
    model: LocalPath
    """Folder with the `open_clip_config.json` of the model's tower: ViT-H-14 for HPSv2.1. Its weights are not read."""
    checkpoint: LocalPath
    """The weights, in open_clip's names: `HPS_v2.1_compressed.pt`, for example."""

    @override
    def check(self) -> None:
        read_clip_folder(self.model, self.checkpoint)

    @override
    def open(self, encoders: Encoders, references: Sequence[Source]) -> Scorer:
        return PromptScorer(encoders.clip(self.model, self.checkpoint))
