"""What a study has used of its limits, over all its controllers, and whether it must end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.front import beats
from trainers.config import Config
from trainers.rundir import read_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from orchestrator.limits import Limits
    from orchestrator.spec import StudySpec
    from orchestrator.tracker import TrialView

_SAVE_SECONDS = 10.0
"""What a killed controller may forget of its own time."""


class Usage(Config):
    """`usage.json` in a study's folder."""

    seconds: float = 0.0
    """During which a controller worked."""
    device_seconds: float = 0.0
    """Of jobs, times the processes of each."""
    saved: float = 0.0
    """When that was, in seconds since 1970."""


def usage_file(root: Path) -> Path:
    """Where a study's use is kept."""
    return root / "usage.json"


def read_usage(root: Path) -> Usage:
    """What was used so far. Raises StorageError."""
    return read_json(usage_file(root), Usage) or Usage()


@dataclass
class Meter:
    """Counts a study's time by the clock that no one sets; jobs that outlived a controller count by the other one."""

    root: Path
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    _usage: Usage = field(init=False)
    _last: float | None = field(default=None, init=False)
    _unsaved: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._usage = read_usage(self.root)

    @property
    def usage(self) -> Usage:
        """Up to the last tick."""
        return self._usage

    def tick(self, num_devices: int) -> None:
        """Count the time since the last call, in which jobs held `num_devices`.

        The first call counts, for the jobs that are found running, the time since the last controller's last word.
        """
        moment = self.clock()
        if self._last is None:
            passed, unseen = 0.0, max(0.0, self.now() - self._usage.saved) if self._usage.saved else 0.0
        else:
            passed, unseen = moment - self._last, 0.0
        self._last = moment
        self._usage = Usage(
            seconds=self._usage.seconds + passed,
            device_seconds=self._usage.device_seconds + (passed + unseen) * num_devices,
            saved=self.now(),
        )
        self._unsaved += passed
        if self._unsaved >= _SAVE_SECONDS or unseen:
            self.save()

    def save(self) -> None:
        """Write down what was used."""
        self._unsaved = 0.0
        write_atomically(usage_file(self.root), self._usage.model_dump_json(indent=2) + "\n")


def reached(spec: StudySpec, trials: Sequence[TrialView], usage: Usage) -> str | None:
    """Why no trial is started any more, of the limits that are not numbers of trials; None if there is no reason."""
    limits = spec.limits
    if limits.hours is not None and usage.seconds >= limits.hours * 3600:
        return f"limits.hours: {usage.seconds / 3600:.3g} of {limits.hours:g} h were worked on it"
    if limits.gpu_hours is not None and usage.device_seconds >= limits.gpu_hours * 3600:
        return f"limits.gpu_hours: {usage.device_seconds / 3600:.3g} of {limits.gpu_hours:g} h were used by jobs"
    return _found_enough(limits, trials)


def _found_enough(limits: Limits, trials: Sequence[TrialView]) -> str | None:
    best: list[list[float]] = []
    idle = 0
    for trial in trials:
        if trial.state not in {"COMPLETE", "PRUNED"}:
            continue
        idle += 1
        values = None if trial.violations or trial.state == "PRUNED" else trial.values
        if values and not any(known == values or beats(known, values) for known in best):
            best, idle = [*(known for known in best if not beats(values, known)), values], 0
            if limits.target is not None and values[0] >= limits.target:
                return f"limits.target: trial {trial.number} has {values[0]:.6g}, of {limits.target:g}"
        if limits.patience is not None and idle >= limits.patience:
            return f"limits.patience: of {idle} trials up to {trial.number}, none is better than those before"
    return None
