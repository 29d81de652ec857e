"""Where a trial runs. Launchers are stateless: a job is known by its id, or by its run directory."""

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import NewType

from pydantic import Field

from trainers.config import Choice

JobId = NewType("JobId", str)


class JobState(StrEnum):
    """Whether a job can still make progress. Whether it succeeded is what it wrote."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True)
class Job:
    """A Python module to run on every rank, and the directory it may write to."""

    module: str
    arguments: tuple[str, ...]
    run_dir: Path

    @property
    def token(self) -> str:
        """Name of the job in its processes' environment: any controller, now or later, computes the same one."""
        return hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:24]


class Launcher(Choice):
    """Family of `launcher:` sections; the config *is* the launcher."""

    num_processes: int = Field(default=1, ge=1)
    """Ranks of a job: torchrun's nproc per node."""
    timeout_minutes: float = Field(default=24 * 60, gt=0)
    """A job that runs longer is ended and submitted again, up to `limits.max_retries` times."""
    poll_seconds: float = Field(default=1.0, gt=0)
    """How often the controller looks at its jobs."""

    @abstractmethod
    def check(self) -> None:
        """Find out whether jobs can run here, without starting one.

        Raises:
            LaunchError: They cannot; the message says why.
        """

    @abstractmethod
    def submit(self, job: Job) -> JobId:
        """Start `job` and return at once. Raises LaunchError."""

    @abstractmethod
    def find(self, job: Job) -> JobId | None:
        """A live job of the same run directory that someone else submitted, or None. Raises LaunchError."""

    @abstractmethod
    def poll(self, job_id: JobId) -> JobState:
        """Current state; ENDED if the id is not known any more. Raises LaunchError."""

    @abstractmethod
    def cancel(self, job_id: JobId) -> None:
        """End the job and wait until none of its processes is left; no error if it has ended. Raises LaunchError."""
