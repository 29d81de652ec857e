"""Ending what a study runs: all of it."""

from __future__ import annotations

import logging
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.launcher import Job, JobState
from orchestrator.signals import pause, undisturbed

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from orchestrator.launcher import JobId, Launcher

log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Jobs that are ended at the same time; each may take seconds."""
_LINGER_SECONDS = 60.0
"""In which a job that has written its answer must end."""
_OTHERS = ("confirm", "replays")
"""Folders in a study's folder with a run directory for each job that is no trial's."""


@dataclass
class Leaving:
    """Jobs that have answered: the place of each is free when its processes are gone, and not before."""

    launcher: Launcher
    _since: dict[JobId, float] = field(default_factory=dict["JobId", float], init=False)

    def is_gone(self, job_id: JobId, state: JobState) -> bool:
        """Whether it has ended, or had to be ended because it would not. Raises LaunchError."""
        if state is not JobState.ENDED:
            if time.monotonic() - self._since.setdefault(job_id, time.monotonic()) < _LINGER_SECONDS:
                return False
            log.warning("job %s has answered and did not end by itself; it is ended", job_id)
            self.launcher.cancel(job_id)
        self._since.pop(job_id, None)
        return True


def end_jobs(launcher: Launcher, job_ids: Iterable[JobId]) -> None:
    """End jobs, several at a time, and wait until none of their processes is left. Raises LaunchError."""
    wanted = list(job_ids)
    if wanted:
        log.info("ending %d jobs", len(wanted))
        with ThreadPoolExecutor(min(_AT_ONCE, len(wanted))) as threads:
            list(threads.map(launcher.cancel, wanted))


def end_others(launcher: Launcher, root: Path) -> None:
    """End what `run` and `replay` started besides trials, and left behind when they were killed. Raises LaunchError."""
    folders = [folder for name in _OTHERS for folder in (root / name).glob("*")]
    found = [launcher.find(Job("", (), folder)) for folder in folders]  # a job is found by its folder
    end_jobs(launcher, [job_id for job_id in found if job_id is not None])


def run_to_end(launcher: Launcher, job: Job) -> None:
    """Run a job that is no trial's, or go on with the one that runs; it ends when this is interrupted.

    Raises:
        LaunchError: It cannot be started or asked.
    """
    if not launcher.outlives_controller and (dying := launcher.find(job)):
        launcher.cancel(dying)
    try:
        while (job_id := launcher.find(job) or launcher.begin(job)) is None:
            pause(launcher.poll_seconds)
        while launcher.poll(job_id) is not JobState.ENDED:
            pause(launcher.poll_seconds)
    finally:
        with undisturbed():  # perhaps we were interrupted before we knew its id
            if left := launcher.find(job):
                launcher.cancel(left)
