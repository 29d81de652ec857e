"""Where a trial runs. Launchers are stateless: a job is known by its id, or by its run directory."""

import hashlib
import os
import time
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import NewType, Self, TypeVar

from pydantic import Field

from orchestrator.signals import pause
from trainers.config import Choice
from trainers.errors import LaunchError

T = TypeVar("T")
JobId = NewType("JobId", str)

TOKEN = "TRIAL_TOKEN"  # noqa: S105  a name, not a secret
"""Environment variable by which all processes of a job are known."""
_PROJECT = Path(__file__).parents[1]

# What a job inherits. Anything else stays here: other jobs' ranks and ports, and secrets above all.
_ENVIRONMENT = frozenset(
    "PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TMPDIR TEMP TMP VIRTUAL_ENV LD_LIBRARY_PATH LD_PRELOAD "
    "DYLD_LIBRARY_PATH XDG_CACHE_HOME HF_HOME HF_HUB_CACHE HF_HUB_OFFLINE TORCH_HOME TRITON_CACHE_DIR "
    "OPENBLAS_NUM_THREADS CUBLAS_WORKSPACE_CONFIG SSL_CERT_FILE".split()
)
_ENVIRONMENT_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "OMP_", "KMP_", "MKL_", "NCCL_", "GLOO_", "PYTORCH_", "COVERAGE_")
_OF_A_MACHINE = frozenset("TMPDIR TEMP TMP CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES".split())
"""What means nothing on another machine."""


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
    devices: tuple[int, ...] = ()
    """GPUs or cores that it has for itself, if its launcher gives them to jobs; else it shares what there is."""
    reads: tuple[Path, ...] = ()
    """Folders of other jobs that it needs, for a launcher whose jobs do not see this machine's disk."""

    @property
    def token(self) -> str:
        """Name of the job in its processes' environment: any controller, now or later, computes the same one."""
        return hashlib.sha256(str(self.run_dir.resolve()).encode()).hexdigest()[:24]


class Launcher(Choice):
    """Family of `launcher:` sections; the config *is* the launcher."""

    num_processes: int = Field(default=1, ge=1)
    """Ranks of a job: torchrun's nproc per node."""
    timeout_minutes: float = Field(default=24 * 60, gt=0)
    """A job that works longer is ended and submitted again, up to `limits.max_retries` times; a queue is no work."""
    poll_seconds: float = Field(default=1.0, gt=0)
    """How often the controller looks at its jobs."""

    def alone(self) -> Self:
        """The same launcher for a job of one process."""
        return self.model_copy(update={"num_processes": 1})

    @abstractmethod
    def check(self) -> None:
        """Find out whether jobs can run here, without starting one.

        Raises:
            LaunchError: They cannot; the message says why.
        """

    def free_devices(self) -> tuple[int, ...] | None:
        """Devices for one more job, or None while none are free; nothing if jobs share what the launcher has.

        Raises:
            LaunchError: The devices cannot be asked.
        """
        return ()

    @property
    def num_ranks(self) -> int:
        """Of a job, over all its machines."""
        return self.num_processes

    @property
    def outlives_controller(self) -> bool:
        """Whether jobs go on when the controller is killed."""
        return True

    def begin(self, job: Job) -> JobId | None:
        """Submit `job` with devices for itself; None while none are free. Raises LaunchError."""
        devices = self.free_devices()
        return None if devices is None else self.submit(replace(job, devices=devices))

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


def job_environment(job: Job, *, elsewhere: bool = False) -> dict[str, str]:
    """Environment variables of `job`, `elsewhere` if it does not run on this machine."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in _ENVIRONMENT or name.startswith(_ENVIRONMENT_PREFIXES)
    }
    if elsewhere:
        kept = {name: value for name, value in kept.items() if name not in _OF_A_MACHINE}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(_PROJECT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",
        TOKEN: job.token,
    }


class BusyError(LaunchError):
    """What looks after the jobs did not answer; it may later."""


def patiently(ask: Callable[[], T], *, minutes: float, pause_seconds: float) -> T:
    """The answer of `ask`, which is repeated for `minutes` while it says that it got none.

    Raises:
        BusyError: It still gets none.
        KeyboardInterrupt: The user does not want to wait.
    """
    deadline = time.monotonic() + minutes * 60
    while True:
        try:
            return ask()
        except BusyError:
            if time.monotonic() > deadline:
                raise
            pause(pause_seconds)


def rendezvous(nodes: int, index: int, endpoint: str) -> tuple[str, ...]:
    """Options of torchrun for the agent of node `index`; the first one keeps the store at `endpoint`."""
    told = f"is_host={int(index == 0)}"  # else each would look up whether the address is its own
    where = ("--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--rdzv-id", endpoint, "--rdzv-conf", told)
    return ("--nnodes", str(nodes), *where)
