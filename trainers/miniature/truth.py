"""Pixel ground truth: how well a picture shows what its prompt asked for, without any learned model."""

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from trainers.miniature.world import Placement, Scene, draw, draw_background, mask

_CLOSE = 30 / 127.5  # mean difference per channel, in [-1, 1] units, up to which two colours count as the same


@dataclass(frozen=True)
class Truth:
    """How one picture compares with its scene."""

    subject: float
    """1 for the object pixel by pixel, 0 for anything no better than an empty background: 1 - SSE / SSE of the empty
    picture over the object and its surroundings, at the placement where it is largest."""
    background: float
    """Share of the pixels around the object that look as they would without it."""

    @property
    def whole(self) -> float:
        """Geometric mean: a picture is right when both its object and its background are."""
        return (self.subject * self.background) ** 0.5


@dataclass(frozen=True)
class _Bank:
    """A scene at many placements; k placements, p = 3 * 64 * 64 values."""

    templates: Float[Tensor, "k p"]
    near: Float[Tensor, "k p"]
    """1 on the object and a margin around it."""
    empty: Float[Tensor, " k"]
    """Squared error of the empty background over `near`."""


def compare(pictures: Float[Tensor, "b 3 64 64"], scene: Scene) -> list[Truth]:
    """Compare pictures in [-1, 1] with `scene` at its best placement."""
    bank = _bank(scene)
    x = pictures.reshape(len(pictures), -1).float()
    error = x.square() @ bank.near.T - 2 * x @ (bank.near * bank.templates).T
    error = error + (bank.near * bank.templates.square()).sum(1)
    fit = 1 - error / bank.empty
    best = fit.argmax(1)
    is_background = (pictures - _background(scene)).abs().mean(1) < _CLOSE
    around = bank.near[best].reshape(-1, 3, *pictures.shape[2:])[:, 0] == 0
    share = (is_background & around).sum((1, 2)) / around.sum((1, 2))
    subjects = cast("list[float]", fit.gather(1, best[:, None])[:, 0].clamp(min=0).tolist())
    backgrounds = cast("list[float]", share.tolist())
    return [Truth(*pair) for pair in zip(subjects, backgrounds, strict=True)]


def _background(scene: Scene) -> Float[Tensor, "1 3 64 64"]:
    return torch.from_numpy(np.array(draw_background(scene))).permute(2, 0, 1)[None] / 127.5 - 1


@lru_cache(maxsize=64)
def _bank(scene: Scene) -> _Bank:
    """Seven positions each way and seven sizes, a little beyond what training pictures have."""
    templates: list[np.ndarray] = []
    near: list[np.ndarray] = []
    for x in np.linspace(0.41, 0.59, 7):
        for y in np.linspace(0.41, 0.59, 7):
            for radius in np.linspace(0.25, 0.42, 7):
                placement = Placement(float(x), float(y), float(radius))
                templates.append(np.asarray(draw(scene, placement), np.float32) / 127.5 - 1)
                near.append(np.asarray(mask(scene, placement)) > 0)
    pictures = torch.from_numpy(np.stack(templates)).permute(0, 3, 1, 2)
    margin = torch.from_numpy(np.stack(near)).float()[:, None]
    margin = torch.nn.functional.max_pool2d(margin, 7, 1, 3).expand(-1, 3, -1, -1)
    empty = (margin * (pictures - _background(scene)).square()).sum((1, 2, 3))
    return _Bank(pictures.flatten(1), margin.flatten(1).contiguous(), empty)
