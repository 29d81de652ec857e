"""One study, random faults while it runs, and what must be true when the same command has finished it."""

# pyright: basic

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import yaml

from orchestrator.__main__ import main as command_line
from orchestrator.commands import run as run_command  # noqa: F401  imported once, for all controllers
from orchestrator.controller import Controller  # noqa: F401  the same
from orchestrator.launcher import Job
from orchestrator.launchers.local import LocalLauncher
from tests.integration import controller_process, crash_job
from tests.integration.mlflow_server import PATIENCE_SECONDS, Server
from tests.orchestrator.studies import build_world
from trainers.rundir import RunDir, thaw

TRIALS = 4
FAULTS = 5
_USER_ERROR, _INTERRUPTED = 2, 130


class AgentLauncher(LocalLauncher):
    """An agent and its rank, without torch."""

    kind: Literal["agent"] = "agent"

    def command(self, job: Job) -> tuple[str, ...]:
        return sys.executable, "-S", crash_job.__file__, *job.arguments


@dataclass
class Report:
    """What one schedule did, and what was wrong afterwards."""

    seed: int
    faults: list[str] = field(default_factory=list)
    controllers: int = 0
    jobs: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def uses_torchrun(seed: int) -> bool:
    """Whether a schedule's jobs are torchrun's: they take seconds to start."""
    return seed % 10 == 9


def has_server(seed: int) -> bool:
    """Whether a schedule's trials go to an MLflow server."""
    return seed % 10 == 8


class Schedule:
    """One study, its faults, and its end."""

    def __init__(self, folder: Path, seed: int, *, has_disk: bool) -> None:
        self.rng, self.report, self.has_disk = random.Random(seed), Report(seed), has_disk
        self.folder, self.pid = folder, 0
        self.found: set[int] = set()
        self.study = build_world(folder)
        tree = yaml.safe_load(self.study.read_text())
        tree["launcher"] = {"kind": "local" if uses_torchrun(seed) else "agent", "gpus": [], "poll_seconds": 0.05}
        tree["limits"] = {"trials": TRIALS, "parallel": self.rng.choice([1, 2, 3]), "max_retries": 99}
        self.server = Server(folder.parent) if has_server(seed) else None
        if self.server:
            tree["tracker"] = {"kind": "mlflow", "uri": self.server.uri}
        tree["sampler"] = {"kind": self.rng.choice(["random", "tpe"])}
        self.study.write_text(yaml.safe_dump(tree))

    @property
    def root(self) -> Path:
        return self.folder / "runs" / "t"

    def run(self) -> Report:
        begin = time.monotonic()
        try:
            for _ in range(FAULTS):
                if not self.pid:
                    self.start()
                time.sleep(self.rng.uniform(0, 0.9))
                fault = self.rng.choice(self.faults())
                self.report.faults.append(fault.__name__)
                fault()
            self.finish()
        except AssertionError as error:
            self.report.problems.append(str(error) or traceback.format_exc())
        finally:
            self.kill_everything()
            if self.server and self.server.process:
                self.server.kill()
        self.report.seconds = time.monotonic() - begin
        return self.report

    def faults(self) -> list[Callable[[], None]]:
        always = [self.kill_controller, self.kill_controller, self.kill_agent, self.kill_rank, self.kill_everything]
        always += [self.interrupt, self.set_clock, self.die_between_steps]
        if self.server and self.server.process:
            always += [self.kill_server] * 4
        return [*always, self.fill_disk, self.forbid_writing] if self.has_disk else always

    def start(self, die_after: str | None = None) -> None:
        self.report.controllers += 1
        self.found = {job.pid for job in jobs(self.folder)}
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(self.be_controller(die_after))

    def be_controller(self, die_after: str | None) -> int:
        """In the child: the command line, with a clock that SIGUSR1 sets."""
        for sign in (signal.SIGTERM, signal.SIGINT):
            signal.signal(sign, lambda *_: os._exit(_INTERRUPTED))  # until the command listens
        error = os.open(self.folder.parent / "stderr.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(error, 1)
        os.dup2(error, 2)
        offset, real, jumps = [0.0], time.time, random.Random(self.report.controllers)
        time.time = lambda: real() + offset[0]

        def jump(*_: object) -> None:
            offset[0] += jumps.choice([-86_000, -3_600, 3_600, 50_000])

        signal.signal(signal.SIGUSR1, jump)
        if die_after:
            controller_process.die_after(die_after)
        try:
            return command_line(["run", str(self.study)])
        except BaseException:  # noqa: BLE001  a traceback is what this test looks for
            traceback.print_exc()
            return 1

    def ended(self) -> int | None:
        """The controller's exit status, if it ended; by a signal it is negative."""
        if not self.pid:
            return None
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if not pid:
            return None
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def wait(self) -> int:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (status := self.ended()) is None:
            assert time.monotonic() < deadline, f"a controller hangs after {self.report.faults}"
            time.sleep(0.02)
        return status

    def signal_controller(self, sign: signal.Signals) -> int:
        if (status := self.ended()) is not None or not self.pid:
            return status or 0
        os.kill(self.pid, sign)
        return self.wait()

    def kill_controller(self) -> None:
        self.signal_controller(signal.SIGKILL)

    def interrupt(self) -> None:
        status = self.signal_controller(self.rng.choice([signal.SIGTERM, signal.SIGINT]))
        assert status in {0, _INTERRUPTED}, f"interrupted, a controller ended with {status}: {self.said()}"
        left = {job.pid for job in jobs(self.folder)} - self.found  # others' may be left if it had no hold of them yet
        assert not left, "an interrupted controller left a job that it had started"

    def set_clock(self) -> None:
        if self.ended() is None and self.pid:
            os.kill(self.pid, signal.SIGUSR1)

    def die_between_steps(self) -> None:
        self.kill_controller()
        self.start(self.rng.choice(sorted(controller_process.PLACES)))
        status = self.wait()
        assert status in {0, -signal.SIGKILL}, f"a controller ended with {status}: {self.said()}"

    def kill_agent(self) -> None:
        self.kill_job(lambda job, all_jobs: job.ppid() not in all_jobs)

    def kill_rank(self) -> None:
        self.kill_job(lambda job, all_jobs: job.ppid() in all_jobs)

    def kill_job(self, is_it: Callable[[psutil.Process, set[int]], bool]) -> None:
        found = jobs(self.folder)
        with suppress(psutil.NoSuchProcess):
            for job in self.rng.sample(found, len(found)):
                if is_it(job, {other.pid for other in found}):
                    job.kill()
                    break

    def kill_everything(self) -> None:
        self.kill_controller()
        while found := jobs(self.folder):
            for job in found:
                with suppress(psutil.NoSuchProcess):
                    job.kill()
            psutil.wait_procs(found, timeout=1)

    def kill_server(self) -> None:
        assert self.server
        self.server.kill()

    def fill_disk(self) -> None:
        filler = self.folder / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
        time.sleep(self.rng.uniform(0, 0.5))
        status = self.ended()
        filler.unlink()
        assert status in {None, 0, _USER_ERROR}, f"on a full disk a controller ended with {status}: {self.said()}"

    def forbid_writing(self) -> None:
        self.kill_everything()
        remount(self.folder, "ro")
        try:
            self.start()
            status = self.wait()
        finally:
            remount(self.folder, "rw")
        assert status in {0, _USER_ERROR}, f"on a read-only disk a controller ended with {status}: {self.said()}"

    def finish(self) -> None:
        """The user's last word: the same command once more."""
        status = self.wait() if self.pid else None
        if self.server and not self.server.process:
            self.server.start()
        if status != 0 or self.server:
            self.start()
            status = self.wait()
        assert status == 0, f"the last controller ended with {status}: {self.said()}"
        assert "Traceback" not in self.said(), self.said()
        assert not jobs(self.folder), "a job is left"
        pid = os.fork()
        if pid == 0:  # SQLite must not be opened before a fork
            os._exit(self.inspect())
        problem = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert problem == 0, (self.folder.parent / "found.txt").read_text()
        self.report.jobs = sum(len(set(pids)) for _, pids in self.steps())

    def inspect(self) -> int:
        """In a child: what the database and the files say."""
        try:
            from orchestrator.spec import load_study
            from orchestrator.storage import read_study

            spec, _ = load_study(self.study)
            trials = read_study(spec).trials
            found = [trial.state.name for trial in trials]
            assert found == ["COMPLETE"] * TRIALS, f"trials lost: {found}"
            for trial in trials:
                frozen = thaw(RunDir(self.root / "trials" / f"{trial.number:04d}").trial, trial.user_attrs["sha256"])
                rates = (frozen["train"]["optimizer"]["lr"], trial.params["train.optimizer.lr"], trial.value)
                assert len(set(rates)) == 1, f"trial {trial.number} has wrong parameters: {rates}"
            for number, pids in self.steps():
                turns = [pid for place, pid in enumerate(pids) if place == 0 or pids[place - 1] != pid]
                assert len(turns) == len(set(turns)), f"two jobs trained trial {number} at once"
            if self.server:
                self.inspect_mirror([trial.value for trial in trials])
        except BaseException:  # noqa: BLE001  told to the parent
            (self.folder.parent / "found.txt").write_text(traceback.format_exc())
            return 1
        return 0

    def inspect_mirror(self, values: list[float | None]) -> None:
        from mlflow import MlflowClient

        assert self.server
        client = MlflowClient(self.server.uri)
        experiment = client.get_experiment_by_name("t")
        assert experiment
        runs = [run for run in client.search_runs([experiment.experiment_id]) if "trial" in run.data.tags]
        told = {int(run.data.tags["trial"]): run.data.metrics.get("objective") for run in runs}
        assert len(runs) == TRIALS, f"MLflow has {len(runs)} runs"
        assert told == dict(enumerate(values)), f"MLflow has the values {told}, and not {values}"

    def steps(self) -> Iterator[tuple[str, list[int]]]:
        for path in sorted((self.root / "trials").glob("*")):
            events = [event for _, event in RunDir(path).read_events()]
            yield path.name, [event["pid"] for event in events if event["event"] == "train"]

    def said(self) -> str:
        path = self.folder.parent / "stderr.txt"
        return path.read_text()[-2000:] if path.exists() else ""


def jobs(folder: Path) -> list[psutil.Process]:
    """Live processes of the study's jobs, whoever started them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in process.cmdline()) and process.pid != os.getpid():
                found.append(process)
    return found


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True, capture_output=True)
