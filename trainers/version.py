"""Which weights predict: the trained ones, the base's, some between the two, or those of a weak checkpoint."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainers.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path


@dataclass(frozen=True)
class Version:
    """Which weights predict."""

    scale: float = 1.0
    """W + scale (W' - W), where W are the base's and W' the trained ones."""
    weak: bool = False
    """Whether W' are those of the weak checkpoint, an earlier step of the same training."""


TRAINED, BASE, WEAK = Version(), Version(scale=0.0), Version(weak=True)


@dataclass(frozen=True)
class Lineage:
    """How a model came about, for guidance that calls upon other versions of it."""

    folder: Path | None
    """What was trained lies there, and its weak version in `weak/`; None if nothing was: all versions are alike."""
    whole: tuple[str, ...] = ()
    """Networks whose every weight was trained, so that an adapter's scale does not lead back to the base."""

    def weak(self) -> Path:
        """Where the weak version lies.

        Raises:
            ModelError: Nowhere.
        """
        folder = self.folder / "weak" if self.folder else None
        if folder is None or not folder.is_dir():
            raise ModelError(
                f"{folder}: no such folder; expected the weak version of what was trained: train with weak_fraction, "
                "or set guidance.weak: base"
            )
        return folder


class Versions(ABC):
    """Versions of a model, ready to predict."""

    @abstractmethod
    def acting(self, versions: Sequence[Version], repeats: int = 1) -> AbstractContextManager[None]:
        """Within the context, rows of a batch are predicted by these versions, `repeats` rows each."""

    @property
    @abstractmethod
    def mixes(self) -> bool:
        """Whether versions can share a batch; otherwise `acting` is given one at a time."""
