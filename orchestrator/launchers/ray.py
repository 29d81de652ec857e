"""Ray (Moritz et al., 2018, arXiv:1712.05889): a trial is a job of Ray's Jobs API.

Everything is asked of the cluster's dashboard, by HTTP. A job is found by its submission id, which follows from its run
directory; its folder must be on a disk that the nodes share.
"""

import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar, cast

from pydantic import Field, PrivateAttr, StringConstraints, model_validator
from typing_extensions import override

from orchestrator.launcher import BusyError, Job, JobId, JobState, Launcher, job_environment, patiently
from trainers.errors import LaunchError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")

_NAME = "trial-"
_QUEUED, _RUNNING = "PENDING", "RUNNING"
_PLACED = "placed"
_GAVE_UP = "JOB_SUPERVISOR_ACTOR_START_TIMEOUT"
"""Ray ends a job that found no room for RAY_JOB_START_TIMEOUT_SECONDS, 15 minutes by default."""
_SHUTDOWN_SECONDS = 10
"""Between asking a job to stop and killing it; Ray itself would kill torchrun after 3 s, before its ranks."""
_CANCEL_SECONDS = 300.0
_MAX_NODES = 10_000
_BUSY = ("no available agent", "try again", "timed out", "unavailable", "status code 502", "status code 504")


class RayLauncher(Launcher):
    """Submits each trial as a Ray job: torchrun on one node, or side by side on several."""

    kind: Literal["ray"] = "ray"
    address: Annotated[str, StringConstraints(pattern=r"^https?://")] = "http://127.0.0.1:8265"
    """The cluster's dashboard, as in `http://head-node:8265`."""
    num_nodes: int = Field(default=1, ge=1)
    """Machines of a job; each runs `num_processes` ranks."""
    cpus: int = Field(default=1, ge=1)
    """CPUs that a job has for itself on each of its nodes."""
    gpus: int = Field(default=0, ge=0)
    """Devices that a job has for itself on each of its nodes; 0 is none (CPU)."""
    resources: dict[str, float] = Field(default={})
    """What else a job needs on each of its nodes, by the cluster's own names: `{"accelerator_type:H100": 0.01}`."""
    autoscaled: bool = False
    """Whether the cluster adds nodes when jobs wait; otherwise a job that its nodes could never hold is refused."""
    patience_minutes: float = Field(default=30, ge=0)
    """How long the dashboard may be away before the study ends with an error; its jobs go on meanwhile."""

    _client: "JobSubmissionClient | None" = PrivateAttr(default=None)
    _jobs: "dict[JobId, JobDetails]" = PrivateAttr(default_factory=dict[JobId, Any])
    _listed_at: float = PrivateAttr(default=float("-inf"))

    @model_validator(mode="after")
    def _every_rank_has_a_gpu(self) -> Self:
        if 0 < self.gpus < self.num_processes:
            raise ValueError(
                f"got num_processes {self.num_processes} and gpus {self.gpus}; expected at most one process a GPU, or "
                "gpus 0"
            )
        return self

    @override
    def alone(self) -> "RayLauncher":
        return self.model_copy(update={"num_processes": 1, "num_nodes": 1})

    @property
    @override
    def num_ranks(self) -> int:
        return self.num_nodes * self.num_processes

    @override
    def check(self) -> None:
        _ask(self._connect)
        if self.autoscaled:
            return
        have = _ask(self._nodes)
        fitting = [node for node in have if all(node.get(name, 0) >= need for name, need in self._needs.items())]
        if len(fitting) < self.num_nodes:
            raise LaunchError(
                f"launcher: got {self.num_nodes} nodes with {_shown(self._needs)} each; expected at most what the "
                f"cluster at {self.address} has ({'; '.join(map(_shown, have))}), or `autoscaled: true`"
            )

    @override
    def submit(self, job: Job) -> JobId:
        return self._patiently(lambda: self._find(job) or self._submit(job))

    @override
    def find(self, job: Job) -> JobId | None:
        return self._patiently(lambda: self._find(job))

    @override
    def poll(self, job_id: JobId) -> JobState:
        last = self._last(job_id)
        if time.monotonic() - self._listed_at > self.poll_seconds or last not in self._jobs:
            self._patiently(self._list)  # once for all jobs: a cluster is not to be asked hundreds of times a second
            last = self._last(job_id)
        details = self._jobs.get(last)
        if details is not None and details.error_type == _GAVE_UP:
            self._patiently(lambda: self._queue_again(last))
            return JobState.QUEUED
        return _state(details)

    @override
    def cancel(self, job_id: JobId) -> None:
        deadline = time.monotonic() + _CANCEL_SECONDS
        self._patiently(self._list)
        last = self._last(job_id)
        if _state(self._jobs.get(last)) is JobState.ENDED:
            return
        self._patiently(lambda: self._stop(last))
        while _state(self._jobs.get(last)) is not JobState.ENDED:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"launcher: got job {last} that did not end in {_CANCEL_SECONDS / 60:.0f} minutes; expected "
                    f"`ray job stop {last}` to end it; see `ray job logs {last}`"
                )
            time.sleep(min(self.poll_seconds, 1.0))
            self._patiently(self._list)

    def entrypoint(self, job: Job, placed: Path) -> str:
        """The shell command that the job is; one of several nodes writes to `placed` which these are."""
        ranks = ("--nproc-per-node", str(self.num_processes), "--shutdown-timeout", str(_SHUTDOWN_SECONDS // 2))
        work = ("-m", job.module, *job.arguments)
        if self.num_nodes == 1:
            module = ("torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
        else:
            needs = ("--nodes", str(self.num_nodes), "--needs", json.dumps(self._needs))
            module = ("orchestrator.ray_nodes", *needs, "--placed", str(placed), "--")
        command = shlex.join([sys.executable, "-m", *module, *ranks, *work])
        run_dir, log = shlex.quote(str(job.run_dir)), shlex.quote(str(job.run_dir / "log.txt"))
        return f"cd {run_dir} && exec {command} >>{log} 2>&1"

    @property
    def _needs(self) -> dict[str, float]:
        """What a job has for itself on each of its nodes, in Ray's words."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {}), **self.resources}

    def _environment(self, job: Job) -> dict[str, str]:
        return {
            "OMP_NUM_THREADS": str(max(1, self.cpus // self.num_processes)),
            **job_environment(job, elsewhere=True),
            "RAY_JOB_STOP_WAIT_TIME_S": str(_SHUTDOWN_SECONDS),
        }

    def _submit(self, job: Job) -> JobId:
        numbers = [_number(known) for known in self._jobs if known.startswith(f"{_NAME}{job.token}-")]
        job_id = JobId(f"{_NAME}{job.token}-{max(numbers, default=0) + 1}")
        placed = job.run_dir / "logs" / f"{job_id}.nodes.txt"
        metadata = {_PLACED: str(placed)} if self.num_nodes > 1 else {}
        self._send(job_id, self.entrypoint(job, placed), {"env_vars": self._environment(job)}, metadata)
        return job_id

    def _queue_again(self, job_id: JobId) -> None:
        """Ray no longer waits for room, and so did not start the job; another one does, in the same words."""
        self._list()
        details, successor = self._jobs.get(job_id), _successor(job_id)
        if details is not None and successor not in self._jobs:
            self._send(successor, details.entrypoint, details.runtime_env or {}, details.metadata or {})

    def _send(self, job_id: JobId, entrypoint: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        # Several nodes are asked for by the job itself, which needs next to nothing where it stands.
        has_room = {} if self.num_nodes > 1 else self._needs
        self._connect().submit_job(
            entrypoint=entrypoint,
            submission_id=job_id,
            runtime_env=runtime_env,
            metadata=metadata,
            entrypoint_num_cpus=has_room.get("CPU"),
            entrypoint_num_gpus=has_room.get("GPU"),
            entrypoint_resources={name: need for name, need in has_room.items() if name in self.resources},
        )
        self._listed_at = float("-inf")

    def _stop(self, job_id: JobId) -> None:
        self._list()
        if _state(self._jobs.get(job_id)) is not JobState.ENDED:
            self._connect().stop_job(job_id)

    def _find(self, job: Job) -> JobId | None:
        self._list()
        ours = [known for known in self._jobs if known.startswith(f"{_NAME}{job.token}-")]
        return next((known for known in ours if _state(self._jobs[known]) is not JobState.ENDED), None)

    def _last(self, job_id: JobId) -> JobId:
        """The job that stands for `job_id` now: itself, or what queues for it since Ray gave it up."""
        while (known := self._jobs.get(job_id)) and known.error_type == _GAVE_UP and _successor(job_id) in self._jobs:
            job_id = _successor(job_id)
        return job_id

    def _list(self) -> None:
        """All trials of the cluster, with one question."""
        listed = [job for job in self._connect().list_jobs() if job.submission_id]
        self._jobs = {
            JobId(job.submission_id): job for job in listed if job.submission_id and job.submission_id.startswith(_NAME)
        }
        self._listed_at = time.monotonic()

    def _nodes(self) -> list[dict[str, float]]:
        """What each living node has in all."""
        from ray.util.state import list_nodes

        listed = list_nodes(address=self.address, filters=[("state", "=", "ALIVE")], limit=_MAX_NODES)
        return [node.resources_total or {} for node in cast("list[Any]", listed)]

    def _connect(self) -> "JobSubmissionClient":
        if self._client is None:
            try:
                from ray.job_submission import JobSubmissionClient
            except ImportError as error:
                raise LaunchError(
                    f"launcher: got {error}; expected Ray, of the same version as the cluster's: "
                    "pip install 'diffusion-tuning[ray]'"
                ) from error
            self._client = JobSubmissionClient(self.address)
        return self._client

    def _patiently(self, ask: Callable[[], T]) -> T:
        return patiently(lambda: _ask(ask), minutes=self.patience_minutes, pause_seconds=max(self.poll_seconds, 1.0))


def _ask(ask: Callable[[], T]) -> T:
    """What the cluster answers; its errors in our words."""
    try:
        return ask()
    except OSError as error:  # requests' errors, and ConnectionError, are of this class
        said = " ".join(str(error).split())
        raise BusyError(f"launcher.address: got {said}; expected the dashboard of a running Ray cluster") from error
    except RuntimeError as error:
        said = " ".join(str(error).split())
        kind = BusyError if any(phrase in said.lower() for phrase in _BUSY) else LaunchError
        raise kind(f"launcher: Ray said: {said}; expected it to accept the request") from error


def _state(details: "JobDetails | None") -> JobState:
    if details is None or details.status.value not in {_QUEUED, _RUNNING}:
        return JobState.ENDED
    placed = (details.metadata or {}).get(_PLACED)
    has_room = details.status.value == _RUNNING and (placed is None or Path(placed).exists())
    return JobState.RUNNING if has_room else JobState.QUEUED


def _number(job_id: str) -> int:
    return int(job_id.rpartition("-")[2])


def _successor(job_id: JobId) -> JobId:
    stem, _, number = job_id.rpartition("-")
    return JobId(f"{stem}-{int(number) + 1}")


def _shown(resources: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in sorted(resources.items()) if not name.startswith("node:"))
