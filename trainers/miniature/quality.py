"""How good a member of the family is, in numbers, on scenes it has not seen."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from trainers.miniature.pictures import Pictures
from trainers.miniature.truth import compare
from trainers.miniature.world import Scene, caption, is_held_out, random_scene

_TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
_BATCH = 64


@dataclass(frozen=True)
class Listening:
    """Denoising losses on pictures the model has not seen; a model that listens needs the right caption."""

    right: float
    wrong: float
    """With captions of other pictures."""
    empty: float

    def numbers(self) -> dict[str, float]:
        """For the manifest; `wrong_over_right` is 1 for a model that is deaf."""
        losses = {"loss_right": self.right, "loss_wrong": self.wrong, "loss_empty": self.empty}
        return {name: round(value, 4) for name, value in losses.items()} | {
            "wrong_over_right": round(self.wrong / self.right, 3)
        }


Errors = Callable[[Tensor, float, Sequence[str]], Tensor]
"""Squared errors [b] of a model for rows of pictures, a time in [0, 1] (1 is noise alone) and captions."""


@torch.no_grad()
def listening(errors: Errors, pictures: Pictures, seed: int = 0) -> Listening:
    """Losses over a grid of times, with the same noise for the right, the wrong and the empty caption."""
    texts = [caption(scene) for scene in pictures.scenes]
    said = {"right": texts, "wrong": texts[1:] + texts[:1], "empty": [""] * len(texts)}
    rows = [list(range(start, min(start + _BATCH, len(texts)))) for start in range(0, len(texts), _BATCH)]
    found: dict[str, list[float]] = {kind: [] for kind in said}
    for kind, captions in said.items():
        for time in _TIMES:
            torch.manual_seed(seed)
            for part in rows:
                found[kind] += cast(
                    "list[float]", errors(torch.tensor(part), time, [captions[row] for row in part]).tolist()
                )
    return Listening(**{kind: mean(values) for kind, values in found.items()})


def scenes(count: int, seed: int, portraits: float = 0.0) -> list[Scene]:
    """Scenes of the plain world to be drawn by a model."""
    rng, found = random.Random(f"quality/{seed}"), list[Scene]()
    while len(found) < count:
        scene = random_scene(rng, portraits)
        if not is_held_out(scene):
            found.append(scene)
    return found


def obedience(pictures: Float[Tensor, "n 3 64 64"], wanted: Sequence[Scene]) -> dict[str, float]:
    """Mean pixel truth of pictures in [-1, 1], each drawn for the caption of one scene."""
    truths = [compare(picture[None], scene)[0] for picture, scene in zip(pictures, wanted, strict=True)]
    return {
        "subject": round(mean(truth.subject for truth in truths), 4),
        "background": round(mean(truth.background for truth in truths), 4),
        "whole": round(mean(truth.whole for truth in truths), 4),
    }
