"""Which square of a resized picture is trained on."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from typing import TYPE_CHECKING, Literal

from pydantic import PositiveInt
from typing_extensions import override

from trainers.config import Choice

if TYPE_CHECKING:
    from collections.abc import Sequence

CENTRED = -1
"""The variant of a picture that is cropped as validation pictures are, whatever the kind of crop."""


class Crop(Choice):
    """Family of `crop` sections: where along the long side of a picture the square begins."""

    @property
    @abstractmethod
    def shown(self) -> Sequence[int]:
        """The variants that each training picture is shown as."""

    @abstractmethod
    def place(self, identity: str, variant: int, side: int, margin: int) -> int:
        """First pixel of the square along the long side.

        Args:
            identity: The picture's id.
            variant: Which of the picture's squares, from 0; `CENTRED` for validation.
            side: Of the square, in pixels; the short side has been resized to it.
            margin: By how many pixels the long side is longer.
        """

    @property
    @abstractmethod
    def description(self) -> str:
        """Names the rule: two equal names give equal squares."""


class CentreCrop(Crop):
    """The middle."""

    kind: Literal["centre"] = "centre"

    @property
    @override
    def shown(self) -> Sequence[int]:
        return (CENTRED,)

    @override
    def place(self, identity: str, variant: int, side: int, margin: int) -> int:
        return margin // 2

    @property
    @override
    def description(self) -> str:
        return "centred"


class AspectCrop(Crop):
    """Squares scattered around the middle, further the longer the picture is.

    Up to an aspect ratio of 2, the square is at most 6 % (square pictures) to 18 % (from 1.7) of the margin away from
    the middle; beyond that, it is in the middle or at the left or upper edge. A hash of the picture's id and the
    variant decides, so a variant is always the same square and the autoencoder sees it once.
    """

    kind: Literal["aspect"] = "aspect"
    variants: PositiveInt = 4
    """Squares of each picture; each is encoded and cached."""

    @property
    @override
    def shown(self) -> Sequence[int]:
        return range(self.variants)

    @override
    def place(self, identity: str, variant: int, side: int, margin: int) -> int:
        middle = margin // 2
        if variant == CENTRED:
            return middle
        draw = int.from_bytes(hashlib.sha256(f"{identity}{variant}".encode()).digest()[:4], "big")
        ratio = (side + margin) / side
        if ratio > 2:
            return 0 if draw % 2 else middle
        share = 0.06 + 0.12 * min(max((ratio - 1) / 0.7, 0.0), 1.0)
        shift = round((2 * draw / 2**32 - 1) * round(share * margin))
        return min(max(middle + shift, 0), margin)

    @property
    @override
    def description(self) -> str:
        return "aspect-aware"
