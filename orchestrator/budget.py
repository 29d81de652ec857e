"""What a study has used of its limits, over all its controllers, and whether it must end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pydantic import Field

from orchestrator.front import beats
from orchestrator.launcher import JobState
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
    """At work of jobs, times the ranks of each; time in a queue is none."""
    saved: float = 0.0
    """When that was, in seconds since 1970."""
    at_work: dict[str, float] = Field(default_factory=dict[str, float])
    """Seconds at work of each job that lives, by its id."""


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
    num_ranks: int = 1
    """Of each job."""
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    _usage: Usage = field(init=False)
    _before: float = field(init=False)
    """The last controller's last word, in seconds since 1970."""
    _last: float | None = field(default=None, init=False)
    _unsaved: float = field(default=0.0, init=False)
    _unseen: set[str] = field(default_factory=set[str], init=False)
    """Jobs of an earlier controller that were not asked about yet."""
    _working: set[str] = field(default_factory=set[str], init=False)
    """Jobs that worked when they were asked about last."""

    def __post_init__(self) -> None:
        self._usage = read_usage(self.root)
        self._before = self._usage.saved

    @property
    def usage(self) -> Usage:
        """Up to the last tick."""
        return self._usage

    def at_work(self, job_id: str) -> float:
        """Seconds that a live job has worked, over all its pieces if it was put back into a queue."""
        return self._usage.at_work.get(job_id, 0.0)

    def tick(self, live: Sequence[str]) -> None:
        """Count the time since the last call, for the controller and for those of the `live` jobs that work."""
        moment = self.clock()
        if self._last is None:
            self._last, self._unseen = moment, set(live)
        passed, self._last = moment - self._last, moment
        self._working &= set(live)
        at_work = {job_id: self.at_work(job_id) + passed * (job_id in self._working) for job_id in live}
        self._usage = Usage(
            seconds=self._usage.seconds + passed,
            device_seconds=self._usage.device_seconds + passed * len(self._working) * self.num_ranks,
            saved=self.now(),
            at_work=at_work,
        )
        self._unsaved += passed
        if self._unsaved >= _SAVE_SECONDS:
            self.save()

    def saw(self, job_id: str, state: JobState, events: Path) -> None:
        """Note what a job that was asked about does.

        What an earlier controller left counts from that one's last word on: until now, or until the last of its
        `events` if it has ended meanwhile.
        """
        if job_id in self._unseen and self._before:
            until = {JobState.RUNNING: self.now(), JobState.ENDED: _modified(events)}.get(state, 0.0)
            unseen = max(0.0, until - self._before)
            self._usage = self._usage.model_copy(
                update={
                    "device_seconds": self._usage.device_seconds + unseen * self.num_ranks,
                    "at_work": {**self._usage.at_work, job_id: self.at_work(job_id) + unseen},
                }
            )
            self.save()
        self._unseen.discard(job_id)
        (self._working.add if state is JobState.RUNNING else self._working.discard)(job_id)

    def save(self) -> None:
        """Write down what was used."""
        self._unsaved = 0.0
        write_atomically(usage_file(self.root), self._usage.model_dump_json(indent=2) + "\n")


def _modified(path: Path) -> float:
    """When, in seconds since 1970; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


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
