"""torchrun on this machine."""

import csv
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Literal, Self

import psutil
from pydantic import Field, model_validator
from typing_extensions import override

from orchestrator import lead
from orchestrator.launcher import TOKEN, Job, JobId, JobState, Launcher, job_environment
from trainers.errors import LaunchError

_CORES = "TRIAL_CORES"
"""Environment variable: cores that a job has for itself."""
_IDLE_SHARE = 0.1
"""Of a device's memory; drivers keep some even if nobody uses it."""
_SHUTDOWN_SECONDS = 10
"""Between asking a job to stop and killing it; torchrun itself would wait for 30 s."""
_LOOK_SECONDS = 0.01
_EXEC_SECONDS = 5.0
"""That a process may take to become another program on a busy machine."""


_children: dict[int, subprocess.Popen[bytes]] = {}
"""Jobs that this process started; it must wait for them, or they stay as zombies."""


class LocalLauncher(Launcher):
    """Runs each trial as `torchrun --standalone` in its own session, out of reach of the terminal's Ctrl-C."""

    kind: Literal["local"] = "local"
    gpus: tuple[int, ...] | None = None
    """CUDA devices that jobs see; null is all of them, an empty list is none (CPU)."""
    gpus_per_trial: int | None = Field(default=None, ge=1)
    """Devices that a job has for itself. It waits until so many are free: no job's process sees them, and their memory
    is back. null lets jobs share `gpus`."""
    cpus_per_trial: int | None = Field(default=None, ge=1)
    """Cores that a job has for itself, of those that the controller may use: none of its processes can leave them, and
    it waits until so many are no other job's. null lets jobs share all cores."""
    on_controller_death: Literal["adopt", "stop"] = "adopt"
    """What becomes of jobs when the controller is killed: they go on and the next `run` adopts them, or they end within
    ten seconds and it starts them again from their checkpoints."""

    @model_validator(mode="after")
    def _every_rank_has_a_gpu(self) -> Self:
        if self.gpus and self.num_processes > len(self.gpus):
            raise ValueError(
                f"got num_processes {self.num_processes} for gpus {list(self.gpus)}; expected at most one a GPU"
            )
        return self

    @model_validator(mode="after")
    def _a_trial_has_its_devices(self) -> Self:
        per_trial = self.gpus_per_trial
        if per_trial is not None and self.cpus_per_trial is not None:
            raise ValueError("got gpus_per_trial and cpus_per_trial; expected one of them")
        if per_trial is not None and self.gpus is not None and per_trial > len(self.gpus):
            raise ValueError(f"got gpus_per_trial {per_trial} for gpus {list(self.gpus)}; expected at most so many")
        if per_trial is not None and self.num_processes > per_trial:
            raise ValueError(
                f"got num_processes {self.num_processes} and gpus_per_trial {per_trial}; expected at most one a GPU"
            )
        return self

    @property
    @override
    def outlives_controller(self) -> bool:
        return self.on_controller_death == "adopt"

    @override
    def free_devices(self) -> tuple[int, ...] | None:
        wanted = self.gpus_per_trial or self.cpus_per_trial
        if wanted is None:
            return ()
        free = self._free_gpus() if self.gpus_per_trial else sorted(_cores() - _given(_CORES))
        return tuple(free[:wanted]) if len(free) >= wanted else None

    @override
    def begin(self, job: Job) -> JobId | None:
        if self.gpus_per_trial is None and self.cpus_per_trial is None:
            return super().begin(job)
        with Path(tempfile.gettempdir(), f"tuning-devices-{os.getuid()}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # else two studies could see the same device free at once
            job_id = super().begin(job)
            if job_id:
                _wait_until_seen(int(job_id.partition(":")[0]))
            return job_id

    def _free_gpus(self) -> list[int]:
        used, taken = gpu_shares(), _given("CUDA_VISIBLE_DEVICES")
        free = [gpu for gpu in self._visible(used) if gpu not in taken]
        return [gpu for gpu in free if used.get(gpu, 1.0) <= _IDLE_SHARE]

    def _visible(self, present: Iterable[int]) -> list[int]:
        """Devices for jobs: the chosen ones, or all that the controller itself may use."""
        if self.gpus is not None:
            return list(self.gpus)
        allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        return [gpu for gpu in sorted(present) if allowed == [""] or str(gpu) in allowed]

    @override
    def check(self) -> None:
        self._check_system()
        present = gpu_bytes()
        if self.gpus_per_trial is not None and self.gpus_per_trial > len(self._visible(present)):
            raise LaunchError(
                f"launcher.gpus_per_trial: got {self.gpus_per_trial}; expected at most as many as nvidia-smi lists and "
                f"CUDA_VISIBLE_DEVICES allows by their numbers, {len(self._visible(present))}"
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

    def _check_system(self) -> None:
        if sys.platform != "linux" and not self.outlives_controller:
            raise LaunchError(f"launcher.on_controller_death: got stop; expected adopt, because this is {sys.platform}")
        if self.cpus_per_trial is not None and self.cpus_per_trial > len(_cores()):
            raise LaunchError(
                f"launcher.cpus_per_trial: got {self.cpus_per_trial}; expected at most as many as this process may "
                f"use and give away, {len(_cores())}"
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
        _end(list(_processes(job.token)))  # what an earlier job of this folder left behind
        cores = ",".join(map(str, job.devices)) if self.cpus_per_trial else ""
        parent = "0" if self.outlives_controller else str(os.getpid())
        words = (sys.executable, "-I", "-S", lead.__file__, parent, cores, *self.command(job))
        start = partial(_start, job, words, {**self._environment(job), **({_CORES: cores} if cores else {})})
        try:
            pid = start() if self.outlives_controller else _starter(os.getpid()).submit(start).result()
        except OSError as error:
            raise LaunchError(f"{job.run_dir}: got {error}; expected to start {sys.executable}") from error
        return JobId(f"{pid}:{job.token}")

    @override
    def find(self, job: Job) -> JobId | None:
        return next((JobId(f"{p.pid}:{job.token}") for p in _processes(job.token) if _is_lead(p)), None)

    @override
    def poll(self, job_id: JobId) -> JobState:
        pid, token = job_id.split(":")
        _reap()
        if _lives(int(pid), token):
            return JobState.RUNNING
        left = list(_processes(token))
        if not any(map(_is_lead, left)):  # else a later job of this folder
            _end(left)
        return JobState.ENDED

    @override
    def cancel(self, job_id: JobId) -> None:
        pid, token = job_id.split(":")
        processes = list(_processes(token)) if _lives(int(pid), token) else []
        for process in processes:
            if process.pid == int(pid):
                _signal(process, signal.SIGTERM)
                psutil.wait_procs(processes, timeout=_SHUTDOWN_SECONDS)
        while survivors := list(_processes(token)):
            _end(survivors)
        _reap()

    def _environment(self, job: Job) -> dict[str, str]:
        threads = max(1, (self.cpus_per_trial or os.cpu_count() or 1) // self.num_processes)
        seen = self.gpus if self.cpus_per_trial else job.devices or self.gpus
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


@cache
def _starter(_controller: int) -> ThreadPoolExecutor:
    """One thread that lives as long as this process: jobs die with the *thread* that started them."""
    return ThreadPoolExecutor(1, thread_name_prefix="starts-jobs")


def _start(job: Job, words: tuple[str, ...], environment: dict[str, str]) -> int:
    with (job.run_dir / "log.txt").open("ab") as log:
        child = subprocess.Popen(  # noqa: S603  our own command
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
            cwd=job.run_dir,
        )
    _children[child.pid] = child
    return child.pid


def _reap() -> None:
    for pid, child in list(_children.items()):
        if child.poll() is not None:
            _children.pop(pid, None)


def gpu_bytes() -> dict[int, int]:
    """Memory of each NVIDIA device by its index, without torch; empty if there is no driver."""
    return {index: total for index, (total,) in _query("memory.total").items()}


def _query(*names: str) -> dict[int, tuple[int, ...]]:
    """Sizes in bytes that nvidia-smi says of each device; one that shares the machine's memory has none: `[N/A]`."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = ["nvidia-smi", f"--query-gpu=index,{','.join(names)}", "--format=csv,noheader,nounits"]
    listed = subprocess.run(query, check=False, capture_output=True, text=True)  # noqa: S603
    if listed.returncode != 0:
        return {}
    rows = [[cell.strip() for cell in row] for row in csv.reader(listed.stdout.splitlines())]
    known = [row for row in rows if all(cell.isdigit() for cell in row)]
    return {int(index): tuple(int(mebibytes) * 2**20 for mebibytes in sizes) for index, *sizes in known}


def gpu_shares() -> dict[int, float]:
    """How full each NVIDIA device's memory is, by its index; empty if there is no driver."""
    return {index: used / total for index, (used, total) in _query("memory.used", "memory.total").items()}


def _cores() -> set[int]:
    """Cores that can be given to jobs; none where the system does not say."""
    return os.sched_getaffinity(0) if sys.platform == "linux" else set()


def _given(variable: str) -> set[int]:
    """What live processes of any job were given, whichever study it belongs to."""
    found = [environment for p in psutil.process_iter() if TOKEN in (environment := _variables(p))]
    listed = [device for environment in found for device in environment.get(variable, "").split(",")]
    return {int(device) for device in listed if device.isdigit()}


def _processes(token: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        if _has_token(process, token):
            yield process


def _lives(pid: int, token: str) -> bool:
    """Whether this is a process of the job.

    While a process becomes another program, as a job's first one does at once, it has no environment for a moment.
    """
    deadline = time.monotonic() + _EXEC_SECONDS
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while not _variables(process) and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
        return _has_token(process, token)
    return False


def _wait_until_seen(pid: int) -> None:
    """Until a job's first process has become torchrun, whose environment says for good which devices it has."""
    deadline = time.monotonic() + _EXEC_SECONDS
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while lead.LEAD not in _variables(process) and time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)


def _has_token(process: psutil.Process, token: str) -> bool:
    return _variables(process).get(TOKEN) == token


def _is_lead(process: psutil.Process) -> bool:
    """Whether it is torchrun, or about to become that; what torchrun started has another's id in its environment."""
    variables = _variables(process)
    return TOKEN in variables and variables.get(lead.LEAD, str(process.pid)) == str(process.pid)


def _variables(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess, OSError):
        return {}


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(processes, timeout=1)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with suppress(psutil.NoSuchProcess):
        process.send_signal(number)
