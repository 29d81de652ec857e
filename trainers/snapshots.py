"""What is trained, exported while training goes on."""

from __future__ import annotations

import re
import shutil
from typing import TYPE_CHECKING

from pydantic import NonNegativeInt, PositiveInt

from trainers.config import Config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NAME = re.compile(r"step-(\d+)")


class SnapshotsConfig(Config):
    """Export the weights to be judged every so many steps, each time into a folder of its own, named by the step.

    A snapshot has the files of the final adapter and loads as it does. The last step has none: it is the adapter.
    """

    every: PositiveInt
    """Optimizer steps."""
    after: NonNegativeInt = 0
    """The first steps, of which none is exported."""
    keep: PositiveInt | None = None
    """The newest so many stay; null is all of them."""

    def due(self, step: int) -> bool:
        """Whether to export after `step` steps."""
        return step > self.after and step % self.every == 0

    def count(self, steps: int) -> int:
        """How many folders there are after `steps` steps, the last of which has none."""
        written = sum(self.due(step) for step in range(self.every, steps, self.every))
        return written if self.keep is None else min(written, self.keep)

    def write(self, export: Callable[[Path], object], folder: Path, step: int) -> None:
        """Export what `step` steps have made into a folder inside `folder`, which appears as a whole; drop old ones."""
        target = folder / f"step-{step:07d}"
        temporary = folder / f".{target.name}.tmp"
        # What an interrupted run left of either is made again.
        for stale in (temporary, target):
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)
        export(temporary)
        temporary.rename(target)
        found = sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))
        for path in found[: -self.keep] if self.keep else ():
            shutil.rmtree(path)
