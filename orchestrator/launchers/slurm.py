"""Slurm (Yoo, Jette, Grondona, 2003): a trial is a batch job.

Everything is asked of `squeue`; accounting (`sacct`) is not needed. A job is found by its name, which follows from its
run directory; its folder must be on a disk that the nodes share.
"""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, PrivateAttr
from typing_extensions import override

from orchestrator.launcher import BusyError, Job, JobId, JobState, Launcher, job_environment, patiently
from trainers.errors import LaunchError

T = TypeVar("T")

_NAME = "trial-"
_QUEUED = frozenset("PENDING CONFIGURING REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD SPECIAL_EXIT".split())
_ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)
_BUSY = (
    "unable to contact",
    "socket timed out",
    "connection refused",
    "connection reset",
    "temporarily unable",
    "zero bytes were transmitted",
    "communication connection failure",
)
"""What Slurm's commands say when its controller is away or overloaded, as opposed to an error of ours."""
_CANCEL_SECONDS = 600.0
"""Slurm kills a job after its KillWait, 30 s by default; a node that does not answer takes longer."""
_OURS = frozenset(
    "array chdir comment error export input job-name no-requeue nodes ntasks ntasks-per-node open-mode output parsable "
    "quiet requeue signal test-only wait wrap".split()
)

_SCRIPT = """#!/bin/bash
# A trial. USR1 means that time is short: the ranks write a checkpoint, and the job goes back into the queue.
trap 'short=yes; scancel --quiet --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM
cd {run_dir} || exit
export OMP_NUM_THREADS="${{OMP_NUM_THREADS:-$(( SLURM_CPUS_ON_NODE > {ranks} ? SLURM_CPUS_ON_NODE / {ranks} : 1 ))}}"
{setup}
srun --mpi=none --kill-on-bad-exit=1 --ntasks-per-node={tasks} \\
  ${{SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK}} {command} &
step=$!
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
if [ -n "$short" ] && [ ! -e result.json ] && [ ! -e error.json ]; then scontrol requeue "$SLURM_JOB_ID"; fi
"""


_RENDEZVOUS = """first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export PET_NNODES={nodes} PET_RDZV_BACKEND=c10d PET_RDZV_ID="$SLURM_JOB_ID-${{SLURM_RESTART_COUNT:-0}}"
export PET_RDZV_ENDPOINT="$MASTER_ADDR:$(( 20000 + SLURM_JOB_ID % 10000 ))"
"""
"""torchrun's options by variables, which a shell can compute. The port is below those that Linux gives out."""


def _are_free(options: dict[str, str | int]) -> dict[str, str | int]:
    for name in options:
        if name in _OURS or name.startswith("-"):
            raise ValueError(
                f"got {name!r}; expected a long option of sbatch, without its dashes, that the launcher does not set "
                f"itself (it sets {', '.join(sorted(_OURS))})"
            )
    return options


class SlurmLauncher(Launcher):
    """Submits each trial with `sbatch`."""

    kind: Literal["slurm"] = "slurm"
    num_nodes: int = Field(default=1, ge=1)
    """Machines of a job; each runs `num_processes` ranks."""
    options: Annotated[dict[str, str | int], AfterValidator(_are_free)] = Field(default={})
    """sbatch's own long options, as in `{partition: gpu, gres: "gpu:4", cpus-per-task: 16, time: 12:00:00}`; an empty
    text is an option without a value (`exclusive: ""`)."""
    setup: tuple[str, ...] = ()
    """Shell lines that run on the first node before the trial, as in `module load cuda`."""
    start: Literal["torchrun", "srun"] = "torchrun"
    """Who starts the ranks: torchrun, once on each node, or srun, once for each rank."""
    checkpoint_seconds: int = Field(default=120, ge=10, le=3600)
    """How long before the end of its time a job is told to write a checkpoint and to queue again."""
    patience_minutes: float = Field(default=30, ge=0)
    """How long Slurm's controller may be away before the study ends with an error; its jobs go on meanwhile."""

    _states: dict[JobId, JobState] = PrivateAttr(default_factory=dict[JobId, JobState])
    _listed_at: float = PrivateAttr(default=float("-inf"))

    @override
    def alone(self) -> "SlurmLauncher":
        return self.model_copy(update={"num_processes": 1, "num_nodes": 1})

    @property
    @override
    def num_ranks(self) -> int:
        return self.num_nodes * self.num_processes

    @override
    def check(self) -> None:
        self._sbatch("--test-only", "--wrap=true")

    @override
    def submit(self, job: Job) -> JobId:
        return self._patiently(lambda: self._find(job) or self._submit(job))

    @override
    def find(self, job: Job) -> JobId | None:
        return self._patiently(lambda: self._find(job))

    @override
    def poll(self, job_id: JobId) -> JobState:
        if time.monotonic() - self._listed_at > self.poll_seconds or job_id not in self._states:
            self._patiently(self._list)  # once for all jobs: a cluster is not to be asked hundreds of times a second
        return self._states.get(job_id, JobState.ENDED)

    @override
    def cancel(self, job_id: JobId) -> None:
        number, _ = job_id.split(":")
        deadline = time.monotonic() + _CANCEL_SECONDS
        if self._look(job_id) is JobState.ENDED:
            return
        self._patiently(lambda: _call(["scancel", "--quiet", number]))
        while self._look(job_id) is not JobState.ENDED:
            if time.monotonic() > deadline:
                raise LaunchError(
                    f"launcher: got job {number} that did not end in {_CANCEL_SECONDS / 60:.0f} minutes; expected "
                    f"`scancel {number}` to end it; see `scontrol show job {number}`"
                )
            time.sleep(min(self.poll_seconds, 1.0))

    def script(self, job: Job) -> str:
        """What the job runs."""
        torchrun = self._torchrun() if self.start == "torchrun" else ()
        setup = [*self.setup, *([_RENDEZVOUS.format(nodes=self.num_nodes)] if self.num_nodes > 1 else [])]
        return _SCRIPT.format(
            run_dir=shlex.quote(str(job.run_dir)),
            ranks=self.num_processes,
            setup="\n".join(setup),
            tasks=self._tasks,
            command=shlex.join([sys.executable, *torchrun, "-m", job.module, *job.arguments]),
        )

    @property
    def _tasks(self) -> int:
        """What Slurm starts on each node."""
        return 1 if self.start == "torchrun" else self.num_processes

    def _torchrun(self) -> tuple[str, ...]:
        alone = () if self.num_nodes > 1 else ("--standalone", "--local-addr", "127.0.0.1")
        ranks = ("--nproc-per-node", str(self.num_processes), "--shutdown-timeout", str(self.checkpoint_seconds))
        return ("-m", "torch.distributed.run", *alone, *ranks)

    def _submit(self, job: Job) -> JobId:
        words = [f"--job-name={_NAME}{job.token}", f"--output={job.run_dir / 'log.txt'}", "--open-mode=append"]
        words += [f"--signal=B:USR1@{self.checkpoint_seconds}", "--requeue", "--parsable"]
        said = self._sbatch(*words, script=self.script(job), environment=job_environment(job, elsewhere=True))
        self._listed_at = float("-inf")
        return JobId(f"{said.strip().partition(';')[0]}:{job.token}")

    def _sbatch(self, *words: str, script: str = "", environment: dict[str, str] | None = None) -> str:
        options = [f"--{name}={value}" if value != "" else f"--{name}" for name, value in self.options.items()]
        shape = [f"--nodes={self.num_nodes}", f"--ntasks-per-node={self._tasks}"]
        return _call(["sbatch", *options, *shape, *words], script, environment)

    def _find(self, job: Job) -> JobId | None:
        self._list()
        live = [known for known, state in self._states.items() if state is not JobState.ENDED]
        return next((known for known in live if known.endswith(f":{job.token}")), None)

    def _look(self, job_id: JobId) -> JobState:
        self._patiently(self._list)
        return self._states.get(job_id, JobState.ENDED)

    def _list(self) -> None:
        """All of this user's trials, with one question."""
        said = _call(["squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%j"])
        rows = [line.strip().split("|", 2) for line in said.splitlines()]
        self._states = {
            JobId(f"{number}:{name.removeprefix(_NAME)}"): _state(state)
            for number, state, name in rows
            if name.startswith(_NAME)
        }
        self._listed_at = time.monotonic()

    def _patiently(self, ask: Callable[[], T]) -> T:
        return patiently(ask, minutes=self.patience_minutes, pause_seconds=max(self.poll_seconds, 1.0))


def _state(word: str) -> JobState:
    if word in _QUEUED:
        return JobState.QUEUED
    return JobState.ENDED if word in _ENDED else JobState.RUNNING


def _call(words: list[str], script: str = "", environment: dict[str, str] | None = None) -> str:
    """What one of Slurm's commands prints."""
    own = {name: value for name, value in os.environ.items() if name in {"PATH", "SLURM_CONF"}}
    try:
        done = subprocess.run(  # noqa: S603  our own command
            words, check=False, capture_output=True, text=True, input=script, env=own | (environment or {})
        )
    except OSError as error:
        raise LaunchError(f"launcher: got {error}; expected Slurm's commands on PATH, as on a login node") from error
    if done.returncode == 0:
        return done.stdout
    said = " ".join(done.stderr.split())
    kind = BusyError if any(phrase in said.lower() for phrase in _BUSY) else LaunchError
    raise kind(f"launcher: {words[0]} said: {said}; expected it to do `{shlex.join(words)}`")
