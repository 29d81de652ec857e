"""Checkpoints of trials that have ended, within a study's share of the disk."""

from __future__ import annotations

import logging
import shutil
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.front import feasible, front

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.limits import Limits
    from orchestrator.tracker import TrialView

log = logging.getLogger(__name__)

_GIB = 2**30
_WORST_FIRST = {"FAIL": 0, "PRUNED": 1, "COMPLETE": 2}


@dataclass
class Quota:
    """Deletes what losing trials can do without; sizes are remembered only to save work."""

    limits: Limits
    _sizes: dict[int, int] = field(default_factory=dict[int, int], init=False)
    _num_seen: int = field(default=0, init=False)

    def enforce(self, trials: Sequence[TrialView]) -> None:
        """Delete checkpoints of ended trials, the worst first, until the rest fits; a repetition deletes nothing."""
        if self.limits.disk_gib is None:
            return
        ended = [trial for trial in trials if trial.state in _WORST_FIRST]
        if len(ended) == self._num_seen:
            return
        self._sizes = {trial.number: self._size(trial) for trial in ended}
        kept = {*self.limits.pinned, *(trial.number for trial in front(trials))}
        kept |= {trial.number for _, trial in feasible(trials)[: self.limits.keep]}
        losers = [trial for trial in sorted(ended, key=_rank) if trial.number not in kept]
        while losers and self._is_full():
            self._delete(losers.pop(0))
        if self._is_full():
            log.warning("checkpoints that are kept need more than limits.disk_gib; lower limits.keep, or unpin some")
        self._num_seen = len(ended)

    def _size(self, trial: TrialView) -> int:
        known = self._sizes.get(trial.number)
        return _bytes(trial) if known is None else known

    def _is_full(self) -> bool:
        return sum(self._sizes.values()) > (self.limits.disk_gib or 0) * _GIB

    def _delete(self, trial: TrialView) -> None:
        if freed := self._sizes[trial.number]:
            with suppress(FileNotFoundError):  # someone deleted them by hand
                shutil.rmtree(trial.run.checkpoints)
            log.info("trial %d: its checkpoints are deleted, %.3g MiB", trial.number, freed / 2**20)
            self._sizes[trial.number] = 0


def _rank(trial: TrialView) -> tuple[int, float, list[float], int]:
    """Failed, pruned, out of bounds, then by value: the first goes first."""
    broken = sum(trial.violations.values())
    return (_WORST_FIRST[trial.state], -broken, trial.values or [], trial.number)


def _bytes(trial: TrialView) -> int:
    return sum(path.stat().st_size for path in trial.run.checkpoints.rglob("*") if path.is_file())
