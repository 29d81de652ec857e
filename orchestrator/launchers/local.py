"""torchrun on this machine."""

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Literal, Self

import psutil
from pydantic import Field, model_validator
from typing_extensions import override

from orchestrator.launcher import TOKEN, Job, JobId, JobState, Launcher, job_environment
from trainers.errors import LaunchError

_DETACH = '"$@" >>"$0" 2>&1 </dev/null & echo $!'
_IDLE_SHARE = 0.1
"""Of a device's memory; drivers keep some even if nobody uses it."""
_SHUTDOWN_SECONDS = 10
"""Between asking a job to stop and killing it; torchrun itself would wait for 30 s."""


class LocalLauncher(Launcher):
    """Runs each trial as `torchrun --standalone` in its own session, so that it outlives the controller."""

    kind: Literal["local"] = "local"
    gpus: tuple[int, ...] | None = None
    """CUDA devices that jobs see; null is all of them, an empty list is none (CPU)."""
    gpus_per_trial: int | None = Field(default=None, ge=1)
    """Devices that a job has for itself. It waits until so many are free: no job's process sees them, and their memory
    is back. null lets jobs share `gpus`."""

    @model_validator(mode="after")
    def _every_rank_has_a_gpu(self) -> Self:
        if self.gpus and self.num_processes > len(self.gpus):
            raise ValueError(
                f"got num_processes {self.num_processes} for gpus {list(self.gpus)}; expected at most one a GPU"
            )
        return self

    @model_validator(mode="after")
    def _a_trial_has_its_gpus(self) -> Self:
        per_trial = self.gpus_per_trial
        if per_trial is not None and self.gpus is not None and per_trial > len(self.gpus):
            raise ValueError(f"got gpus_per_trial {per_trial} for gpus {list(self.gpus)}; expected at most so many")
        if per_trial is not None and self.num_processes > per_trial:
            raise ValueError(
                f"got num_processes {self.num_processes} and gpus_per_trial {per_trial}; expected at most one a GPU"
            )
        return self

    @override
    def free_devices(self) -> tuple[int, ...] | None:
        if self.gpus_per_trial is None:
            return ()
        taken = _devices_of_jobs()
        used = gpu_shares()
        free = [gpu for gpu in (sorted(used) if self.gpus is None else self.gpus) if gpu not in taken]
        free = [gpu for gpu in free if used.get(gpu, 1.0) <= _IDLE_SHARE]
        return tuple(free[: self.gpus_per_trial]) if len(free) >= self.gpus_per_trial else None

    @override
    def check(self) -> None:
        present = gpu_bytes()
        if self.gpus_per_trial is not None and self.gpus_per_trial > len(present):
            raise LaunchError(
                f"launcher.gpus_per_trial: got {self.gpus_per_trial}; expected at most as many as nvidia-smi lists, "
                f"{len(present)}"
            )
        for gpu in self.gpus or ():
            if gpu not in present:
                have = f"those that nvidia-smi lists: {sorted(present)}" if present else "an empty list: there are none"
                raise LaunchError(f"launcher.gpus: got {gpu}; expected {have}")
        if self.gpus is None and present and self.num_processes > len(present):
            raise LaunchError(
                f"launcher.num_processes: got {self.num_processes}; expected at most one a GPU, of which there are "
                f"{len(present)} (`gpus: []` runs on the CPU)"
            )

    def command(self, job: Job) -> tuple[str, ...]:
        """What is executed.

        `--standalone` takes a free port, so studies never clash; without an address of its own, torchrun would look up
        this machine's name, which waits for long where no server knows it.
        """
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1")
        ranks = ("--nproc-per-node", str(self.num_processes), "--shutdown-timeout", str(_SHUTDOWN_SECONDS // 2))
        return (*torchrun, *ranks, "-m", job.module, *job.arguments)

    @override
    def submit(self, job: Job) -> JobId:
        shell = ["sh", "-c", _DETACH, str(job.run_dir / "log.txt"), *self.command(job)]
        try:
            started = subprocess.run(  # noqa: S603  our own command
                shell,
                check=True,
                capture_output=True,
                start_new_session=True,
                env=self._environment(job),
                cwd=job.run_dir,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise LaunchError(f"{job.run_dir}: got {error}; expected to start {sys.executable}") from error
        return JobId(f"{int(started.stdout)}:{job.token}")

    @override
    def find(self, job: Job) -> JobId | None:
        processes = {process.pid: process for process in _processes(job.token)}
        for pid, process in processes.items():
            with suppress(psutil.NoSuchProcess):
                if process.ppid() not in processes:
                    return JobId(f"{pid}:{job.token}")
        return None

    @override
    def poll(self, job_id: JobId) -> JobState:
        pid, token = job_id.split(":")
        with suppress(psutil.NoSuchProcess):
            if _has_token(psutil.Process(int(pid)), token):
                return JobState.RUNNING
        return JobState.ENDED

    @override
    def cancel(self, job_id: JobId) -> None:
        pid, token = job_id.split(":")
        processes = list(_processes(token))
        for process in processes:
            if process.pid == int(pid):
                _signal(process, signal.SIGTERM)
                psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
        while survivors := list(_processes(token)):
            for process in survivors:
                _signal(process, signal.SIGKILL)
            psutil.wait_procs(survivors, timeout=1)

    def _environment(self, job: Job) -> dict[str, str]:
        threads = max(1, (os.cpu_count() or 1) // self.num_processes)
        seen = job.devices or self.gpus
        devices = (
            {}
            if seen is None
            else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, seen)), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
        )  # that order is how nvidia-smi counts
        return {
            "OMP_NUM_THREADS": str(threads),
            **job_environment(job),
            **devices,
        }


def gpu_bytes() -> dict[int, int]:
    """Memory of each NVIDIA device by its index, without torch; empty if there is no driver."""
    return {index: total for index, (total,) in _query("memory.total").items()}


def _query(*names: str) -> dict[int, tuple[int, ...]]:
    """Sizes in bytes that nvidia-smi says of each device."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(names)}", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, check=False, capture_output=True, text=True)  # noqa: S603
    if listed.returncode != 0:
        return {}
    rows = csv.reader(listed.stdout.splitlines())
    return {int(index): tuple(int(mebibytes) * 2**20 for mebibytes in sizes) for index, *sizes in rows}


def gpu_shares() -> dict[int, float]:
    """How full each NVIDIA device's memory is, by its index; empty if there is no driver."""
    return {index: used / total for index, (used, total) in _query("memory.used", "memory.total").items()}


def _devices_of_jobs() -> set[int]:
    """Devices that a live process of any job sees, whichever study it belongs to."""
    seen: set[int] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            environment = process.environ()
            if TOKEN in environment:
                listed = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
                seen |= {int(device) for device in listed if device.isdigit()}
    return seen


def _processes(token: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        if _has_token(process, token):
            yield process


def _has_token(process: psutil.Process, token: str) -> bool:
    try:
        return process.environ().get(TOKEN) == token
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
        return False


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
