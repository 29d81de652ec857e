"""Ending a study: by a signal, and then all that it runs, without being disturbed."""

from __future__ import annotations

import logging
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.launcher import Job, JobState

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable
    from pathlib import Path
    from types import FrameType

    from orchestrator.launcher import JobId, Launcher

log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Jobs that are ended at the same time; each may take seconds."""
_LINGER_SECONDS = 60.0
"""In which a job that has written its answer must end."""
_OTHERS = ("confirm", "replays")
"""Folders in a study's folder with a run directory for each job that is no trial's."""
_LOOK_SECONDS = 0.1
"""Between two looks for a signal."""
_signals: list[int] = []
"""What asked this process to end, since `interruptible` began."""


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


@contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C and SIGTERM end the block by KeyboardInterrupt: at its next `pause`, or at once when repeated.

    Not at once the first time: what a signal's handler raises inside of a finalizer is dropped, and inside of
    pydantic's serialization it looks like a mistake in the study.
    """
    listened = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's job in the background: Ctrl-C means another
        listened.remove(signal.SIGINT)
    before = {number: signal.signal(number, _note) for number in listened}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _signals.clear()


def _note(number: int, _frame: FrameType | None) -> None:
    _signals.append(number)
    if len(_signals) > 1:
        raise KeyboardInterrupt


def pause(seconds: float) -> None:
    """Sleep between two looks at jobs.

    Raises:
        KeyboardInterrupt: A signal came, now or since `interruptible` began.
    """
    deadline = time.monotonic() + seconds
    while not _signals and (rest := deadline - time.monotonic()) > 0:
        time.sleep(min(rest, _LOOK_SECONDS))
    if _signals:
        raise KeyboardInterrupt


@contextmanager
def undisturbed() -> Generator[None]:
    """Ignore Ctrl-C and SIGTERM: the second Ctrl-C must not leave jobs behind that the first one was to end."""
    if threading.current_thread() is not threading.main_thread():  # which signals do not reach
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
        job_id = launcher.find(job) or launcher.submit(job)
        while launcher.poll(job_id) is not JobState.ENDED:
            pause(launcher.poll_seconds)
    finally:
        with undisturbed():  # perhaps we were interrupted before we knew its id
            if left := launcher.find(job):
                launcher.cancel(left)
